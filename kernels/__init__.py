"""Triton kernels, one file per op. Installed as `inpaintrt.kernels`; never import the bare name `kernels`."""
