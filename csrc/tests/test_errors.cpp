// Calls that are wrong in one place, or in two: each kernel and launch plan answers with a status, and touches nothing.
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#include "tensors.h"

namespace {

constexpr int64_t kMax = INT64_MAX, kMin = INT64_MIN;

// A correct call with everything it points to, so that faults can be put anywhere. Views: [0] the output, [1] y, [2]
// grad.
struct Subject {
  const char* name;
  bool backward;
  float memory[64];
  irt_view views[3];
  int64_t needs[1] = {1};
  irt_value args[8];
  irt_call call;

  Subject(const char* op, bool is_backward) : name(op), backward(is_backward) {
    const irt_view small{memory, IRT_F32, 4, {1, 2, 2, 3}, {12, 6, 3, 1}};
    const irt_view large{memory + 12, IRT_F32, 4, {1, 4, 2, 3}, {24, 6, 3, 1}};
    views[0] = backward ? large : small;
    views[0].data = memory;
    views[1] = large;
    views[1].data = memory + 24;
    views[2] = small;
    views[2].data = memory + 48;
    for (float& x : memory) x = 0.5f;
    const irt_value forward_args[] = {value(views[1]), value("elu"), none(), value(1.0)};
    memcpy(args + (backward ? 1 : 0), forward_args, sizeof forward_args);
    if (backward) {
      args[0] = list(views[2], 1);
      args[5] = list(needs, 1);
    }
    args[6] = args[7] = none();
    call = call_of(args, backward ? 6 : 4, views, 1, 2);
  }
  Subject(const Subject&) = delete;
  Subject& operator=(const Subject&) = delete;

  irt_value& y() { return args[backward ? 1 : 0]; }
  irt_value& activation() { return args[backward ? 2 : 1]; }
  irt_value& alpha() { return args[backward ? 3 : 2]; }
  irt_value& gain() { return args[backward ? 4 : 3]; }
};

struct Fault {
  const char* name;
  std::function<void(Subject&)> apply;
  int code;
};

std::vector<Fault> faults() {
  std::vector<Fault> all;
  const auto add = [&all](const char* name, std::function<void(Subject&)> apply, int code = IRT_BAD_ARGUMENT) {
    all.push_back({name, std::move(apply), code});
  };
  add("no arguments", [](Subject& s) { s.call.nargs = 0; });
  add("negative number of arguments", [](Subject& s) { s.call.nargs = -1; });
  add("most negative number of arguments", [](Subject& s) { s.call.nargs = INT_MIN; });
  add("null arguments", [](Subject& s) { s.call.args = nullptr; });
  add("an argument short", [](Subject& s) { s.call.nargs = s.backward ? 5 : 3; });
  add("an argument more", [](Subject& s) { s.call.nargs = s.backward ? 7 : 5; });
  add("no outputs", [](Subject& s) { s.call.nouts = 0; });
  add("negative number of outputs", [](Subject& s) { s.call.nouts = -1; });
  add("null outputs", [](Subject& s) { s.call.outs = nullptr; });
  add("two outputs", [](Subject& s) { s.call.nouts = 2; });

  for (int kind : {-1, 7, 99, INT_MAX}) {
    add("unknown kind", [kind](Subject& s) { s.y().kind = kind; });
    add("unknown kind of a scalar", [kind](Subject& s) { s.gain().kind = kind; });
  }
  add("absent tensor", [](Subject& s) { s.y() = none(); });
  add("null tensor", [](Subject& s) { s.y().tensors = nullptr; });
  add("a list for a tensor", [](Subject& s) { s.y() = list(s.views[1], 1); });
  add("a number for a tensor", [](Subject& s) { s.y() = value(1.0); });
  add("null activation", [](Subject& s) { s.activation().s = nullptr; });
  add("absent activation", [](Subject& s) { s.activation() = none(); });
  add("unknown activation", [](Subject& s) { s.activation() = value("gelu"); });
  add("empty activation", [](Subject& s) { s.activation() = value(""); });
  add("a number for the activation", [](Subject& s) { s.activation() = value(3.0); });
  add("a string for alpha", [](Subject& s) { s.alpha() = value("1"); });
  add("a tensor for gain", [](Subject& s) { s.gain() = value(s.views[1]); });
  add("a list for gain", [](Subject& s) { s.gain() = list(s.needs, 1); });

  for (int view = 0; view < 2; ++view) {  // the output, and y
    const auto of = [view](std::function<void(irt_view&)> f) { return [view, f](Subject& s) { f(s.views[view]); }; };
    add("null data", of([](irt_view& v) { v.data = nullptr; }));
    for (int dtype : {-1, 8, INT_MAX}) add("unknown dtype", of([dtype](irt_view& v) { v.dtype = dtype; }));
    for (int dtype : {IRT_F16, IRT_F64, IRT_U8}) add("another dtype", of([dtype](irt_view& v) { v.dtype = dtype; }));
    for (int ndim : {-1, INT_MIN, 0, 3, 5, 7, INT_MAX}) add("rank", of([ndim](irt_view& v) { v.ndim = ndim; }));
    for (int d = 0; d < 4; ++d) {
      for (int64_t size : {int64_t{-1}, kMin, kMax, kMax / 2 + 1, int64_t{0}, int64_t{7}}) {
        add("size", of([d, size](irt_view& v) { v.sizes[d] = size; }));
      }
      if (d == 0) continue;  // of size 1: its stride is never used
      for (int64_t stride : {kMax, kMin, kMin + 1}) {
        add("stride", of([d, stride](irt_view& v) { v.strides[d] = stride; }));
      }
    }
  }
  add(
      "a dtype there is no kernel for",
      [](Subject& s) {
        for (irt_view& v : s.views) v.dtype = IRT_F64;
      },
      IRT_UNSUPPORTED);
  add("sizes whose product overflows", [](Subject& s) {
    for (irt_view& v : s.views) v.sizes[0] = v.sizes[2] = v.sizes[3] = int64_t{1} << 31;
  });
  add("odd channels", [](Subject& s) { s.views[1].sizes[1] = 3; });
  return all;
}

std::vector<Fault> backward_faults() {
  std::vector<Fault> all;
  const auto add = [&all](const char* name, std::function<void(Subject&)> apply) {
    all.push_back({name, std::move(apply), IRT_BAD_ARGUMENT});
  };
  add("no gradients", [](Subject& s) { s.args[0].count = 0; });
  add("negative list of gradients", [](Subject& s) { s.args[0].count = -1; });
  add("two gradients", [](Subject& s) { s.args[0].count = 2; });
  add("null gradients", [](Subject& s) { s.args[0].tensors = nullptr; });
  add("a tensor for the list of gradients", [](Subject& s) { s.args[0] = value(s.views[2]); });
  add("an empty list, as Python passes it", [](Subject& s) { s.args[0] = list(s.needs, 0); });
  add("gradient without data", [](Subject& s) { s.views[2].data = nullptr; });
  add("gradient of another dtype", [](Subject& s) { s.views[2].dtype = IRT_BF16; });
  add("gradient of another shape", [](Subject& s) { s.views[2].sizes[3] = 2; });
  add("gradient of y's shape", [](Subject& s) { s.views[2] = s.views[1]; });
  add("needs without data", [](Subject& s) { s.args[5].ints = nullptr; });
  add("needs of negative length", [](Subject& s) { s.args[5].count = -3; });
  return all;
}

struct Op {
  const char* name;
  bool backward, plan;
};
const Op ops[] = {
    {"gated_activation", false, false},
    {"gated_activation_backward", true, false},
    {"gated_activation", false, true},
    {"gated_activation_wide", false, true},
};

// The status of the call; nothing that memory holds may have changed when it is not OK.
irt_status answer(const Op& op, Subject& s) {
  irt_status status;
  memset(&status, 0x7e, sizeof status);  // as uninitialised memory is
  float before[64];
  memcpy(before, s.memory, sizeof before);
  if (op.plan) {
    irt_plan plan;
    memset(&plan, 0x7e, sizeof plan);
    irt_plan_find(op.name)(&s.call, &plan, &status);
    CHECK(status.code == IRT_OK || plan.count == 0, "%s: launches beside an error", op.name);
  } else {
    irt_cpu_find(op.name)(&s.call, &status);
  }
  const bool touched = memcmp(before, s.memory, sizeof before) != 0;
  CHECK(!touched || status.code == IRT_OK, "%s: memory changed beside an error", op.name);
  CHECK(status.code >= IRT_OK && status.code <= IRT_DEVICE_ERROR, "%s: status %d", op.name, status.code);
  CHECK(memchr(status.message, 0, sizeof status.message), "%s: a message without an end", op.name);
  return status;
}

std::vector<Fault> faults_of(const Op& op) {
  std::vector<Fault> all = faults();
  if (op.backward) {
    for (Fault& fault : backward_faults()) all.push_back(std::move(fault));
  }
  return all;
}

void correct_calls_are_accepted() {
  for (const Op& op : ops) {
    Subject s(op.name, op.backward);
    const irt_status status = answer(op, s);
    CHECK(status.code == IRT_OK && !*status.message, "%s: %d %s", op.name, status.code, status.message);
    CHECK(op.plan || s.memory[0] != 0.5f, "%s did nothing", op.name);
  }
}

void one_fault() {
  int count = 0;
  for (const Op& op : ops) {
    for (const Fault& fault : faults_of(op)) {
      Subject s(op.name, op.backward);
      fault.apply(s);
      const irt_status status = answer(op, s);
      CHECK(status.code == fault.code, "%s, %s: status %d '%s'", op.name, fault.name, status.code, status.message);
      CHECK(*status.message, "%s, %s: no message", op.name, fault.name);
      ++count;
    }
  }
  check::note("%d calls", count);
}

// A second fault must not hide the first one's guard. (Two faults of size may make a correct call of tensors that are
// not there, which no kernel can see; they are left out.)
void two_faults() {
  int count = 0;
  for (const Op& op : ops) {
    const std::vector<Fault> all = faults_of(op);
    for (size_t i = 0; i < all.size(); ++i) {
      for (size_t j = 0; j < all.size(); ++j) {
        if (strstr(all[i].name, "size") && strstr(all[j].name, "size")) continue;
        Subject s(op.name, op.backward);
        all[i].apply(s);
        all[j].apply(s);
        const irt_status status = answer(op, s);
        CHECK(status.code == IRT_OK || *status.message, "%s, %s and %s: no message", op.name, all[i].name, all[j].name);
        ++count;
      }
    }
  }
  check::note("%d calls", count);
}

}  // namespace

const check::Case check::cases[] = {
    {"correct calls are accepted", correct_calls_are_accepted},
    {"one fault", one_fault},
    {"two faults", two_faults},
    {nullptr, nullptr},
};
