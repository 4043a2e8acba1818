/* The C ABI of inpaintrt's native code.
 *
 * A kernel is a C function of one `irt_call`: the op's arguments in schema order, then its outputs. Nothing here knows
 * torch, Python or CUDA headers, so that the same kernels serve the Python package, a C++ product and the tests.
 * Strides and sizes are in elements; a kernel validates what it reads and reports through `irt_status`, never by
 * exception.
 */
#ifndef INPAINTRT_ABI_H
#define INPAINTRT_ABI_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define IRT_ABI_VERSION 4
#define IRT_MAX_DIMS 6
#define IRT_MAX_LAUNCHES 8
#define IRT_MAX_ALGORITHMS 12

typedef enum irt_dtype {
  IRT_F32 = 0,
  IRT_F16 = 1,
  IRT_BF16 = 2,
  IRT_F64 = 3,
  IRT_I32 = 4,
  IRT_I64 = 5,
  IRT_U8 = 6,
  IRT_BOOL = 7
} irt_dtype;

typedef struct irt_view {
  void* data;
  int32_t dtype; /* irt_dtype */
  int32_t ndim;
  int64_t sizes[IRT_MAX_DIMS];
  int64_t strides[IRT_MAX_DIMS];
} irt_view;

typedef enum irt_kind {
  IRT_NONE = 0, /* an optional argument that is absent */
  IRT_TENSOR = 1,
  IRT_TENSORS = 2,
  IRT_INT = 3, /* also bool */
  IRT_FLOAT = 4,
  IRT_STRING = 5,
  IRT_INTS = 6 /* also a list of bool */
} irt_kind;

typedef struct irt_value {
  int32_t kind;  /* irt_kind */
  int32_t count; /* of TENSORS and INTS */
  union {
    const irt_view* tensors; /* TENSOR (one) or TENSORS */
    int64_t i;
    double f;
    const char* s;
    const int64_t* ints;
  };
} irt_value;

typedef struct irt_call {
  const irt_value* args;
  const irt_view* outs;
  int32_t nargs;
  int32_t nouts;
  int32_t threads; /* CPU: at most this many; CUDA: unused */
  int32_t device;  /* CUDA device index; -1 on CPU */
  void* stream;    /* CUDA: the stream to launch on; CPU: NULL */
  int32_t ieee; /* not 0 = no algorithm whose rounding error exceeds the direct form's; CUDA: no TF32 in convolutions */
} irt_call;

typedef enum irt_code {
  IRT_OK = 0,
  IRT_BAD_ARGUMENT = 1,
  IRT_UNSUPPORTED = 2,
  IRT_OUT_OF_MEMORY = 3,
  IRT_DEVICE_ERROR = 4
} irt_code;

typedef struct irt_status {
  int32_t code; /* irt_code */
  char message[252];
} irt_status;

/* `call` and `status` are not null; the kernel sets the status in any case. A call of the wrong form (null pointers,
 * negative counts, unknown kinds, sizes that overflow, arguments an op does not have) is IRT_BAD_ARGUMENT. */
typedef void (*irt_kernel)(const irt_call* call, irt_status* status);

/* Which of its algorithms a kernel takes for a call, and by what name a preference for such calls goes. Algorithms are
 * text for people and files ("direct", "winograd F(4×4,3×3)", UTF-8); the strings live as long as the library. */
typedef struct irt_choice {
  char key[192];                              /* all that the choice depends on */
  const char* algorithms[IRT_MAX_ALGORITHMS]; /* those that compute this call as `ieee` demands */
  int32_t count;                              /* of them; 0: there is nothing to compute */
  int32_t chosen;                             /* an index; -1 without algorithms */
  int32_t ieee;    /* not 0: under the call's `ieee`, or as if it were set, because the data are such */
  int32_t refused; /* not 0: the preference for this key is none of the kernel's, or cannot compute this call */
} irt_choice;

/* Takes the call that the kernel would get. Writes to no output, and reads no other data than the choice depends on:
 * the mask of partial_conv2d. */
typedef void (*irt_chooser)(const irt_call* call, irt_choice* choice, irt_status* status);

/* One launch of a CUDA kernel: computed in plain host C++, for the nvcc and the NVRTC path alike. */
typedef struct irt_launch {
  char entry[192]; /* the C++ name expression of the kernel instance, e.g. "irt::gated_activation<float, 3>" */
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t shared_bytes; /* dynamic shared memory; a kernel has to be allowed more than 48 KB before its launch */
  uint32_t params_bytes;
  unsigned char params[1024]; /* the kernel's first parameter, passed by value */
} irt_launch;

/* What a call launches, in this order on one stream; no launches = nothing to do. If there is a workspace, each kernel
 * has a second parameter: its address, `void*`, a multiple of 256. What it holds is lost after the last launch.
 *
 * With rounds, which only plans with a workspace have, the launches from `first_repeated` on run, one after the other,
 * `rounds` times; their kernels have a third parameter: the number of the round, `int`, from 0. */
typedef struct irt_plan {
  int64_t workspace_bytes; /* of device memory */
  int32_t count;           /* of launches */
  int32_t first_repeated;  /* unused without rounds */
  int32_t rounds;          /* 0: each launch runs once */
  irt_launch launches[IRT_MAX_LAUNCHES];
} irt_plan;

typedef void (*irt_planner)(const irt_call* call, irt_plan* plan, irt_status* status);

/* Puts a plan's launches on the call's stream and does not wait for them. `workspace`: plan->workspace_bytes of the
 * call's device, the kernels' own until the stream has passed them; unused where the plan needs none. */
typedef void (*irt_launcher)(const irt_call* call, const irt_plan* plan, void* workspace, irt_status* status);

/* CPU kernels, at the best ISA of this machine or the one forced with INPAINTRT_CPU_ISA (scalar, avx2, avx512,
 * avx512bf16). */
int irt_abi_version(void);
const char* irt_cpu_isa(
    void); /* the chosen one; NULL when the forced name is unknown, not built or not supported here */
const char* irt_cpu_isa_error(void);           /* why irt_cpu_isa() is NULL; "" otherwise */
irt_kernel irt_cpu_find(const char* name);     /* NULL when there is none */
irt_chooser irt_cpu_chooser(const char* name); /* NULL when there is no kernel, or one algorithm */
irt_planner irt_plan_find(const char* name);   /* likewise */
int irt_cpu_count(void);                       /* of kernels at the chosen ISA, for listings */
const char* irt_cpu_name(int index);           /* NULL outside [0, count) */

/* Replaces the preferences by `count` pairs of an irt_choice's key and an algorithm; none: every kernel decides by its
 * model of costs. A preference that a call cannot follow (an unknown name, an algorithm that does not compute it or
 * that its `ieee` forbids) is left aside. Calls may run meanwhile. Returns an irt_code; the preferences stay as they
 * were unless it is IRT_OK. Of equal keys the last counts. */
int irt_cpu_prefer(const char* const* keys, const char* const* algorithms, int count);

/* The workspace arena shared by all CPU kernels. */
int64_t irt_arena_bytes(void);           /* held now, in use or kept for reuse */
int64_t irt_arena_peak_bytes(void);      /* most that was ever held */
void irt_arena_set_limit(int64_t bytes); /* of what is kept for reuse; default 1 GiB */
void irt_empty_cache(void);              /* give back what is not in use */

/* A block of the arena, for a caller's large tensors: at least *bytes, which becomes its size; null when memory cannot
 * be had. It stays the caller's until it is given back, with that size. */
void* irt_arena_take(int64_t* bytes);
void irt_arena_give(void* block, int64_t bytes);

/* The OpenMP runtime this library is bound to: a path, or "" for serial execution. */
const char* irt_openmp_runtime(void);

#ifdef __cplusplus
}
#endif
#endif
