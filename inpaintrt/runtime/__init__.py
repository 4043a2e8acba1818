"""What every op shares: specification, registration, dispatch, native library, settings, module swapping."""
