// Which algorithm a kernel says it takes, and how irt_cpu_prefer changes that: also while others ask, and never to one
// that cannot compute the call.
#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "tensors.h"

namespace {

constexpr const char* kF43 = "winograd F(4×4,3×3)";
constexpr const char* kF23 = "winograd F(2×2,3×3)";

// A 3×3 convolution of 32 to 32 channels on 24×24 pixels: one that Winograd wins by any model of costs.
struct Layer {
  Random random{7};
  Tensor x{random, IRT_F32, {{1, 32, 24, 24}}, Memory::nchw};
  Tensor weight{random, IRT_F32, {{64, 32, 3, 3}}, Memory::nchw};
  Tensor out{random, IRT_F32, {{1, 32, 24, 24}}, Memory::nchw};
  int64_t padding[4] = {1, 1, 1, 1};
  irt_value one{IRT_INT, 1, {}};
  std::vector<irt_value> args;
  irt_call call;

  Layer() {
    x.fill(random);
    weight.fill(random);
    one.i = 1;
    args = {value(x.view()), value(weight.view()), none(), one,       list(padding, 4), one,
            value("zeros"),  value("none"),        none(), value(1.0)};
    call = call_of(args.data(), static_cast<int>(args.size()), &out.view(), 1, 2);
  }

  irt_choice choice() const {
    irt_choice found;
    irt_status status;
    irt_cpu_chooser("gated_conv2d")(&call, &found, &status);
    CHECK(status.code == IRT_OK, "%s", status.message);
    return found;
  }
  std::string chosen() const {
    const irt_choice found = choice();
    return found.chosen < 0 ? "" : found.algorithms[found.chosen];
  }
};

int prefer(const std::string& key, const char* algorithm) {
  const char* keys[] = {key.c_str()};
  const char* algorithms[] = {algorithm};
  return irt_cpu_prefer(keys, algorithms, 1);
}

bool has(const irt_choice& choice, const char* algorithm) {
  for (int i = 0; i < choice.count; ++i) {
    if (!strcmp(choice.algorithms[i], algorithm)) return true;
  }
  return false;
}

void choices() {
  CHECK(!irt_cpu_chooser("gated_activation") && !irt_cpu_chooser("none") && !irt_cpu_chooser(nullptr),
        "nothing to choose");
  for (const char* op : {"fused_conv2d", "gated_conv2d", "partial_conv2d"}) CHECK(irt_cpu_chooser(op), "%s", op);
  Layer layer;
  const irt_choice usual = layer.choice();
  CHECK(usual.count == 4 && has(usual, "direct") && has(usual, "columns") && has(usual, kF43) && has(usual, kF23), "%d",
        usual.count);
  CHECK(layer.chosen() == kF43 && !usual.refused, "%s", layer.chosen().c_str());
  layer.call.ieee = 1;
  const irt_choice exact = layer.choice();
  CHECK(exact.count == 3 && !has(exact, kF43) && layer.chosen() == kF23, "%s", layer.chosen().c_str());
  CHECK(strcmp(exact.key, usual.key), "precision is part of a call's form: %s", usual.key);
  layer.call.ieee = 0, layer.call.threads = 1;
  CHECK(strcmp(layer.choice().key, usual.key), "threads are part of a call's form: %s", usual.key);
}

void calls_that_are_none() {
  Layer layer;
  irt_choice found;
  irt_status status;
  layer.args[3].i = 9;  // the stride
  irt_cpu_chooser("gated_conv2d")(&layer.call, &found, &status);
  CHECK(status.code == IRT_BAD_ARGUMENT && found.count == 0 && found.chosen == -1, "%d", status.code);
  layer.call.nargs = -1;
  irt_cpu_chooser("gated_conv2d")(&layer.call, &found, &status);
  CHECK(status.code == IRT_BAD_ARGUMENT && found.count == 0 && found.chosen == -1, "%d", status.code);
}

void preferences() {
  Layer layer;
  const std::string key = layer.choice().key, usual = layer.chosen();
  CHECK(prefer(key, "direct") == IRT_OK && layer.chosen() == "direct" && !layer.choice().refused, "%s", key.c_str());
  CHECK(prefer(key + "0", "direct") == IRT_OK && layer.chosen() == usual, "another key");
  for (const char* wrong : {"", "no such", "pointwise"}) {
    CHECK(prefer(key, wrong) == IRT_OK && layer.chosen() == usual && layer.choice().refused, "%s", wrong);
  }
  layer.call.ieee = 1;
  const std::string exact = layer.choice().key;
  CHECK(prefer(exact, kF43) == IRT_OK && layer.chosen() == kF23 && layer.choice().refused, "%s", exact.c_str());
  CHECK(irt_cpu_prefer(nullptr, nullptr, 0) == IRT_OK && !layer.choice().refused, "none");
}

void wrong_preferences_change_nothing() {
  Layer layer;
  const std::string key = layer.choice().key, too_long(48, 'x');
  prefer(key, "direct");
  const char *keys[] = {key.c_str(), nullptr}, *algorithms[] = {kF23, nullptr};
  CHECK(irt_cpu_prefer(keys, algorithms, -1) == IRT_BAD_ARGUMENT, "a negative count");
  CHECK(irt_cpu_prefer(keys, algorithms, 2) == IRT_BAD_ARGUMENT, "a null string");
  CHECK(irt_cpu_prefer(nullptr, algorithms, 1) == IRT_BAD_ARGUMENT, "null keys");
  CHECK(irt_cpu_prefer(keys, nullptr, 1) == IRT_BAD_ARGUMENT, "null algorithms");
  CHECK(prefer(key, too_long.c_str()) == IRT_BAD_ARGUMENT, "a name that no algorithm has");
  CHECK(layer.chosen() == "direct", "%s", layer.chosen().c_str());
  const char *twice[] = {keys[0], keys[0]}, *both[] = {"direct", kF23};
  CHECK(irt_cpu_prefer(twice, both, 2) == IRT_OK && layer.chosen() == kF23, "of equal keys the last counts");
  irt_cpu_prefer(nullptr, nullptr, 0);
}

// Threads that run the layer and ask for its algorithm, while another one changes it.
void replaced_while_calls_run() {
  Layer first;
  const std::string key = first.choice().key;
  std::atomic<bool> done{false};
  std::atomic<int> calls{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 2; ++i) {
    callers.emplace_back([&] {
      Layer layer;
      while (!done) {
        irt_status status;
        irt_cpu_find("gated_conv2d")(&layer.call, &status);
        CHECK(status.code == IRT_OK, "%s", status.message);
        const std::string chosen = layer.chosen();
        CHECK(chosen == kF43 || chosen == kF23 || chosen == "direct", "%s", chosen.c_str());
        ++calls;
      }
    });
  }
  for (int i = 0; i < 2000 || calls < 200; ++i) prefer(key, i % 3 ? i % 3 == 1 ? "direct" : kF23 : "no such");
  done = true;
  for (std::thread& caller : callers) caller.join();
  irt_cpu_prefer(nullptr, nullptr, 0);
}

}  // namespace

const check::Case check::cases[] = {
    {"the choice of a call", choices},
    {"calls that are none", calls_that_are_none},
    {"preferences", preferences},
    {"wrong preferences change nothing", wrong_preferences_change_nothing},
    {"preferences are replaced while calls run", replaced_while_calls_run},
    {nullptr, nullptr},
};
