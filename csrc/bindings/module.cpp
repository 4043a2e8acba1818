// Python binding: turns an op's argument tuple into an `irt_call` and runs a kernel or a launch planner on it.
//
// There is no per-op code here. Tensors are read through DLPack's exchange table (about 50 ns each, no reference
// taken); the GIL is released while a kernel runs.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "dlpack.h"
#include "inpaintrt/abi.h"

namespace py = pybind11;

namespace {

PyTypeObject* tensor_type = nullptr;
const irt::dlpack::ExchangeApi* exchange = nullptr;

void bind_tensor_type(const py::type& type) {
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  const auto* api =
      static_cast<const irt::dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), irt::dlpack::kCapsule));
  if (!api) throw py::error_already_set();
  if (api->major != irt::dlpack::kMajor) {
    throw std::runtime_error("torch's DLPack exchange table has major version " + std::to_string(api->major) +
                             ", this build reads 1");
  }
  if (!api->tensor_from_object || !api->current_stream) {
    throw std::runtime_error("torch's DLPack exchange table lacks an optional function that this build needs");
  }
  tensor_type = reinterpret_cast<PyTypeObject*>(py::object(type).release().ptr());  // lives as long as the process
  exchange = api;
}

int dtype_code(const irt::dlpack::Tensor& t) {
  switch (t.dtype.code << 8 | t.dtype.bits) {
    case 2 << 8 | 32: return IRT_F32;
    case 2 << 8 | 16: return IRT_F16;
    case 4 << 8 | 16: return IRT_BF16;
    case 2 << 8 | 64: return IRT_F64;
    case 0 << 8 | 32: return IRT_I32;
    case 0 << 8 | 64: return IRT_I64;
    case 1 << 8 | 8: return IRT_U8;
    case 6 << 8 | 8: return IRT_BOOL;
    default: return -1;
  }
}

// An `irt_call` and the memory behind it. Fixed capacity: a call allocates nothing.
class Call {
 public:
  Call(py::tuple args, py::tuple outs, int device_type, int threads, bool ieee = false) : device_type_(device_type) {
    call_.threads = threads;
    call_.ieee = ieee;
    call_.device = -1;
    call_.nargs = checked(args.size(), kValues);
    for (int i = 0; i < call_.nargs; ++i) read(args[i].ptr(), values_[i]);
    call_.nouts = checked(outs.size(), kViews - used_views_);
    irt_view* first = views_ + used_views_;
    for (int i = 0; i < call_.nouts; ++i) view(outs[i].ptr());
    call_.args = values_;
    call_.outs = first;
    if (device_type == irt::dlpack::kCuda && call_.device >= 0) {
      if (exchange->current_stream(device_type, call_.device, &call_.stream)) throw py::error_already_set();
    }
  }
  const irt_call* get() const { return &call_; }

 private:
  static constexpr int kValues = 40, kViews = 64, kInts = 128;

  static int checked(size_t n, int limit) {
    if (n > static_cast<size_t>(limit)) throw py::value_error("too many arguments for one native call");
    return static_cast<int>(n);
  }

  const irt_view* view(PyObject* object) {
    if (!PyObject_TypeCheck(object, tensor_type)) throw py::type_error("expected a torch.Tensor");
    irt::dlpack::Tensor t;
    if (exchange->tensor_from_object(object, &t)) throw py::error_already_set();
    const bool here =
        t.device.type == device_type_ || (device_type_ == irt::dlpack::kCpu && t.device.type == irt::dlpack::kCudaHost);
    if (!here) throw py::value_error("a tensor is on another device than this backend's");
    if (device_type_ == irt::dlpack::kCuda) {
      if (call_.device >= 0 && call_.device != t.device.index)
        throw py::value_error("tensors are on different CUDA devices");
      call_.device = t.device.index;
    }
    checked(used_views_ + 1, kViews);
    irt_view& out = views_[used_views_++];
    out.dtype = dtype_code(t);
    out.ndim = t.ndim;
    if (out.dtype < 0 || t.ndim > IRT_MAX_DIMS) throw py::value_error("a tensor's dtype or rank has no native form");
    out.data = static_cast<char*>(t.data) + t.byte_offset;
    for (int d = 0; d < t.ndim; ++d) {
      out.sizes[d] = t.shape[d];
      out.strides[d] = t.strides[d];
    }
    return &out;
  }

  void read(PyObject* object, irt_value& value) {
    value.count = 1;
    if (object == Py_None) {
      value.kind = IRT_NONE;
    } else if (PyObject_TypeCheck(object, tensor_type)) {
      value.kind = IRT_TENSOR;
      value.tensors = view(object);
    } else if (PyFloat_Check(object)) {
      value.kind = IRT_FLOAT;
      value.f = PyFloat_AS_DOUBLE(object);
    } else if (PyLong_Check(object)) {  // bool too
      value.kind = IRT_INT;
      value.i = integer(object);
    } else if (PyUnicode_Check(object)) {
      value.kind = IRT_STRING;
      value.s = PyUnicode_AsUTF8(object);
      if (!value.s) throw py::error_already_set();
    } else if (PyList_Check(object) || PyTuple_Check(object)) {
      read_list(object, value);
    } else {
      throw py::type_error(std::string("an argument of type ") + Py_TYPE(object)->tp_name + " has no native form");
    }
  }

  void read_list(PyObject* object, irt_value& value) {
    const Py_ssize_t n = PySequence_Fast_GET_SIZE(object);
    value.count = static_cast<int32_t>(n);
    const bool tensors = n > 0 && PyObject_TypeCheck(PySequence_Fast_GET_ITEM(object, 0), tensor_type);
    value.kind = tensors ? IRT_TENSORS : IRT_INTS;
    if (tensors) {
      value.tensors = views_ + used_views_;
      for (Py_ssize_t i = 0; i < n; ++i) view(PySequence_Fast_GET_ITEM(object, i));
    } else {
      checked(used_ints_ + n, kInts);
      value.ints = ints_ + used_ints_;
      for (Py_ssize_t i = 0; i < n; ++i) ints_[used_ints_++] = integer(PySequence_Fast_GET_ITEM(object, i));
    }
  }

  static int64_t integer(PyObject* object) {
    // Anything else might run Python code (__index__), which might change the list that is being read.
    if (!PyLong_Check(object)) throw py::type_error("a list may hold tensors or integers only");
    const long long value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

  int device_type_;
  int used_views_ = 0, used_ints_ = 0;
  irt_call call_{};
  irt_value values_[kValues];
  irt_view views_[kViews];
  int64_t ints_[kInts];
};

void raise_unless_ok(const irt_status& status) {
  if (status.code == IRT_OK) return;
  if (status.code == IRT_BAD_ARGUMENT) throw py::value_error(status.message);
  if (status.code == IRT_OUT_OF_MEMORY) {
    PyErr_SetString(PyExc_MemoryError, status.message);
    throw py::error_already_set();
  }
  throw std::runtime_error(status.message);
}

struct Kernel {
  irt_kernel run;
  irt_chooser choose;

  void operator()(const py::tuple& args, const py::tuple& outs, int threads, bool ieee) const {
    const Call call(args, outs, irt::dlpack::kCpu, threads, ieee);
    irt_status status;
    {
      const py::gil_scoped_release release;
      run(call.get(), &status);
    }
    raise_unless_ok(status);
  }

  // (key, algorithms, index of the chosen one, whether as under ieee, whether a preference is refused); None where
  // there is nothing to choose.
  py::object choice(const py::tuple& args, const py::tuple& outs, int threads, bool ieee) const {
    if (!choose) return py::none();
    const Call call(args, outs, irt::dlpack::kCpu, threads, ieee);
    irt_choice found;
    irt_status status;
    choose(call.get(), &found, &status);
    raise_unless_ok(status);
    if (!found.count) return py::none();
    py::tuple algorithms(found.count);
    for (int i = 0; i < found.count; ++i) algorithms[i] = py::str(found.algorithms[i]);
    return py::make_tuple(found.key, algorithms, found.chosen, found.ieee != 0, found.refused != 0);
  }
};

void prefer(const std::map<std::string, std::string>& preferences) {
  std::vector<const char*> keys, algorithms;
  for (const auto& [key, algorithm] : preferences) {
    keys.push_back(key.c_str());
    algorithms.push_back(algorithm.c_str());
  }
  switch (irt_cpu_prefer(keys.data(), algorithms.data(), static_cast<int>(keys.size()))) {
    case IRT_OK: return;
    case IRT_OUT_OF_MEMORY: throw std::bad_alloc();
    default: throw py::value_error("a preference's key or algorithm is too long");
  }
}

py::tuple described(const irt_launch& one) {
  return py::make_tuple(std::string(one.entry), py::make_tuple(one.grid[0], one.grid[1], one.grid[2]),
                        py::make_tuple(one.block[0], one.block[1], one.block[2]), one.shared_bytes,
                        py::bytes(reinterpret_cast<const char*>(one.params), one.params_bytes));
}

struct Planner {
  irt_planner plan;

  // ([(entry, grid, block, shared bytes, parameter bytes, round or None), …], workspace bytes); no launches = nothing
  // to do. Launches that are repeated are listed as often as they run.
  py::tuple operator()(const py::tuple& args, const py::tuple& outs, int device_type, bool ieee) const {
    const Call call(args, outs, device_type, 0, ieee);
    irt_plan p;
    irt_status status;
    plan(call.get(), &p, &status);
    raise_unless_ok(status);
    py::list launches;
    const int repeated = p.rounds ? p.first_repeated : p.count;
    for (int i = 0; i < repeated; ++i) launches.append(described(p.launches[i]) + py::make_tuple(py::none()));
    py::tuple again[IRT_MAX_LAUNCHES];
    for (int i = repeated; i < p.count; ++i) again[i] = described(p.launches[i]);
    for (int round = 0; round < p.rounds; ++round) {
      for (int i = repeated; i < p.count; ++i) launches.append(again[i] + py::make_tuple(round));
    }
    return py::make_tuple(launches, p.workspace_bytes);
  }
};

struct CudaKernel {
  irt_planner plan;
  irt_launcher launch;

  // `allocate(output, bytes)` returns a tensor on that output's device, in torch's stream order: the workspace, which
  // may therefore go back as soon as the launches are on the stream. Called only where the plan needs one.
  void operator()(const py::tuple& args, const py::tuple& outs, const py::object& allocate, bool ieee) const {
    const Call call(args, outs, irt::dlpack::kCuda, 0, ieee);
    irt_plan p;
    irt_status status;
    plan(call.get(), &p, &status);
    raise_unless_ok(status);
    py::object workspace = py::none();
    void* memory = nullptr;
    if (p.workspace_bytes) {
      workspace = allocate(outs[0], p.workspace_bytes);
      memory = reinterpret_cast<void*>(workspace.attr("data_ptr")().cast<uintptr_t>());
    }
    {
      const py::gil_scoped_release release;
      launch(call.get(), &p, memory, &status);
    }
    raise_unless_ok(status);
  }
};

struct CudaLibrary {
  void* handle = nullptr;
  irt_launcher (*find)(const char*) = nullptr;
  irt_planner (*find_plan)(const char*) = nullptr;
  const char* (*info)() = nullptr;
} cuda;

void load_cuda(const std::string& path) {
  CudaLibrary found;
  found.handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!found.handle) throw std::runtime_error(dlerror());
  found.find = reinterpret_cast<decltype(found.find)>(dlsym(found.handle, "irt_cuda_find"));
  found.info = reinterpret_cast<decltype(found.info)>(dlsym(found.handle, "irt_cuda_info"));
  found.find_plan = reinterpret_cast<decltype(found.find_plan)>(dlsym(found.handle, "irt_plan_find"));
  if (!found.find || !found.find_plan || !found.info) {
    dlclose(found.handle);
    throw std::runtime_error(path + " is not an inpaintrt CUDA library");
  }
  cuda = found;
}

py::object cpu_kernel(const char* name) {
  const irt_kernel run = irt_cpu_find(name);
  return run ? py::cast(Kernel{run, irt_cpu_chooser(name)}) : py::none();
}

py::object cuda_kernel(const char* name) {
  const irt_launcher launch = cuda.find ? cuda.find(name) : nullptr;
  const irt_planner plan = launch ? cuda.find_plan(name) : nullptr;
  return plan ? py::cast(CudaKernel{plan, launch}) : py::none();
}

// A block of the arena as a DLPack capsule of bytes, which goes back to the arena when its last tensor is gone.
struct ArenaTensor {
  irt::dlpack::ManagedTensor managed{};
  int64_t bytes, size;

  explicit ArenaTensor(int64_t wanted) : bytes(wanted), size(wanted) {
    managed.tensor.data = irt_arena_take(&bytes);
    managed.tensor.device = {irt::dlpack::kCpu, 0};
    managed.tensor.ndim = 1;
    managed.tensor.dtype = {1, 8, 1};  // uint8
    managed.tensor.shape = &size;
    managed.context = this;
    managed.deleter = [](irt::dlpack::ManagedTensor* self) { delete static_cast<ArenaTensor*>(self->context); };
  }
  ~ArenaTensor() { irt_arena_give(managed.tensor.data, bytes); }
  ArenaTensor(const ArenaTensor&) = delete;
  ArenaTensor& operator=(const ArenaTensor&) = delete;
};

py::capsule arena_tensor(int64_t bytes) {
  auto* made = new ArenaTensor(bytes);
  if (!made->managed.tensor.data) {
    delete made;
    PyErr_NoMemory();
    throw py::error_already_set();
  }
  return py::capsule(&made->managed, irt::dlpack::kManaged, [](PyObject* capsule) {
    // Whoever took it has renamed the capsule.
    if (!PyCapsule_IsValid(capsule, irt::dlpack::kManaged)) return;
    auto* managed = static_cast<irt::dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, irt::dlpack::kManaged));
    managed->deleter(managed);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of inpaintrt behind one generic call";
  py::class_<Kernel>(m, "Kernel")
      .def("__call__", &Kernel::operator(), py::arg("args"), py::arg("outs"), py::arg("threads"),
           py::arg("ieee") = false)
      .def("choice", &Kernel::choice, py::arg("args"), py::arg("outs"), py::arg("threads"), py::arg("ieee") = false);
  py::class_<CudaKernel>(m, "CudaKernel")
      .def("__call__", &CudaKernel::operator(), py::arg("args"), py::arg("outs"), py::arg("allocate"),
           py::arg("ieee") = false);
  py::class_<Planner>(m, "Planner")
      .def("__call__", &Planner::operator(), py::arg("args"), py::arg("outs"), py::arg("device_type"),
           py::arg("ieee") = false);
  m.def("bind_tensor_type", &bind_tensor_type);
  m.def("cpu_kernel", &cpu_kernel);
  m.def("prefer", &prefer);
  m.def("cpu_kernels", [] {
    py::list names;
    for (int i = 0; i < irt_cpu_count(); ++i) names.append(irt_cpu_name(i));
    return names;
  });
  m.def("planner", [](const char* name) -> py::object {
    const irt_planner plan = irt_plan_find(name);
    return plan ? py::cast(Planner{plan}) : py::none();
  });
  m.def("load_cuda", &load_cuda);
  m.def("cuda_kernel", &cuda_kernel);
  m.def("cuda_info", [] { return std::string(cuda.info ? cuda.info() : ""); });
  m.def("cpu_isa", [] {
    if (!irt_cpu_isa()) throw py::value_error(irt_cpu_isa_error());
    return irt_cpu_isa();
  });
  m.def("openmp_runtime", [] { return std::string(irt_openmp_runtime()); });
  m.def("arena_bytes", &irt_arena_bytes);
  m.def("arena_peak_bytes", &irt_arena_peak_bytes);
  m.def("arena_set_limit", &irt_arena_set_limit);
  m.def("empty_cache", &irt_empty_cache);
  m.def("arena_tensor", &arena_tensor, py::arg("bytes"));
  m.def("build_info", [] {
    py::dict info;
    info["version"] = INPAINTRT_VERSION;
    info["abi"] = irt_abi_version();
    info["compiler"] = "g++ " __VERSION__;
    info["isas"] = INPAINTRT_ISAS;
    return info;
  });
}
