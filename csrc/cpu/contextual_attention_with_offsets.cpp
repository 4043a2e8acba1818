// contextual_attention_with_offsets on the CPU: contextual_attention with a second output.
#include "contextual_call.h"

namespace irt::INPAINTRT_ISA {

static void contextual_attention_with_offsets(const irt_call& call, irt_status& status) {
  contextual::attend(call, true, status);
}

IRT_CPU_KERNEL(contextual_attention_with_offsets)

}  // namespace irt::INPAINTRT_ISA
