// Launch plan of nearest_code: with few vectors, chunks of the codes are what fills a GPU.
#include "nearest_code.h"

#include "plan.h"
// After plan.h, which says whose namespace it is in.
#include "nearest_code_call.h"

namespace irt::plan {
namespace {

constexpr int64_t kBlocks = 512;  // as many as fill large GPUs more than once; reasoned, not measured

int64_t ceiling(int64_t n, int64_t d) { return (n + d - 1) / d; }

void nearest_code(const irt_call& given, irt_plan& plan, irt_status& status) {
  NearestCodeCall call;
  if (!call.read(given, status)) return;
  const irt_view &x = *call.x, &codebook = *call.codebook;
  const Storage type = storage(x.dtype);
  if (!type.per_vector) return fail(status, IRT_UNSUPPORTED, "dtype must be float32, bfloat16 or float16");
  const int64_t vectors = x.sizes[0];
  if (vectors == 0) return;  // no launches: nothing to do
  if (vectors > kNarrow - NearestCode::kVectors || x.sizes[1] > kNarrow - NearestCode::kDepth) {
    return fail(status, IRT_UNSUPPORTED, "the tensors have more elements than one launch can cover");
  }

  NearestCode p{};
  p.x = x.data;
  p.codebook = codebook.data;
  for (int d = 0; d < 2; ++d) p.x_strides[d] = x.strides[d], p.code_strides[d] = codebook.strides[d];
  if (call.known) p.known = call.known->data, p.known_stride = call.known->strides[0];
  p.bytes = call.known && call.known->dtype == IRT_BOOL;
  p.vectors = static_cast<int>(vectors);
  p.codes = static_cast<int>(codebook.sizes[0]);
  p.depth = static_cast<int>(x.sizes[1]);
  p.split = static_cast<int>(call.split);
  const int64_t blocks = ceiling(vectors, NearestCode::kVectors), tiles = ceiling(p.codes, NearestCode::kCodes);
  const int64_t wanted = blocks < kBlocks ? kBlocks / blocks : 1;
  const int64_t each = ceiling(tiles, tiles < wanted ? tiles : wanted), chunks = ceiling(tiles, each);
  p.blocks = static_cast<int>(blocks);
  p.chunk = static_cast<int>(each * NearestCode::kCodes);
  plan.workspace_bytes = chunks * vectors * static_cast<int64_t>(sizeof(NearestCode::Found));
  irt_launch* launch = add_launch(plan, blocks * chunks * NearestCode::kThreads, NearestCode::kThreads, status);
  if (!launch) return;
  launch->shared_bytes = sizeof(NearestCode::Memory);
  snprintf(launch->entry, sizeof launch->entry, "irt::nearest_code_search<%s>", type.name);
  set_params(*launch, p);

  NearestCodeFirst first{};
  first.out = static_cast<long long*>(call.out->data);
  first.vectors = p.vectors;
  first.chunks = static_cast<int>(chunks);
  launch = add_launch(plan, vectors, NearestCodeFirst::kThreads, status);
  if (!launch) return;
  snprintf(launch->entry, sizeof launch->entry, "irt::nearest_code_first<%d>", NearestCodeFirst::kThreads);
  set_params(*launch, first);
}

}  // namespace

IRT_PLAN(nearest_code)

}  // namespace irt::plan
