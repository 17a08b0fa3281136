// A "CUDA" whose memory is the host's and whose kernels are the CPU's, for a CPU build of torch.
//
// Tensors truly say cuda:N, with storages, an allocator, generators, a device guard and hooks of
// their own. Every operator without a kernel for CUDA goes to one boxed function that refuses
// tensors of other devices, as CUDA would, and runs the CPU's kernel on the same memory. A copy to
// pinned memory that does not block is put off until its stream is waited for, and what it will
// overwrite is poisoned until then. Loaded before `import torch`: see core.py.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <set>

using namespace c10;
using at::Tensor;

namespace {

constexpr int MOST = 64;
thread_local int current = 0;       // the thread's device
thread_local int64_t stream = 0;    // the thread's stream on it; 0 = the default one
int devices = 8;
std::atomic<int64_t> limit{80LL << 30};  // bytes of each device
using Callback = void (*)(const char* kind, const char* what);
Callback callback = nullptr;        // told of every host wait and every first touch of a device

void tell(const char* kind, const std::string& what) {
  if (callback) callback(kind, what.c_str());
}

// ---- memory

struct Counter {
  std::atomic<int64_t> now{0}, peak{0}, highest{0};  // highest: peaks that were set back, too
};

void raise(std::atomic<int64_t>& most, int64_t now) {
  int64_t before = most;
  while (now > before && !most.compare_exchange_weak(before, now)) {}
}

std::array<Counter, MOST> counters;

struct Block { void* data; size_t bytes; int device; };

struct DeviceAllocator final : public Allocator {
  DataPtr allocate(size_t bytes) override {
    int device = current;
    auto& c = counters[device];
    if (c.now + static_cast<int64_t>(bytes) > limit) {
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes,
                       " bytes. GPU ", device, " has a total capacity of ", limit.load(),
                       " bytes of which ", limit - c.now, " bytes is free.");
    }
    c.now += bytes;
    raise(c.peak, c.now);
    raise(c.highest, c.now);
    void* data = bytes ? std::malloc(bytes) : nullptr;
    if (data) std::memset(data, 0xFF, bytes);  // NaN, so that what nobody wrote is seen
    auto* block = new Block{data, bytes, device};
    return {data, block, &release, Device(DeviceType::CUDA, device)};
  }
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    counters[block->device].now -= block->bytes;
    std::free(block->data);
    delete block;
  }
  DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};
DeviceAllocator device_allocator;

std::mutex pinned_mutex;
std::map<const char*, size_t> pinned;  // start -> bytes

struct PinnedAllocator final : public Allocator {
  DataPtr allocate(size_t bytes) override {
    void* data = std::malloc(std::max<size_t>(bytes, 1));
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned[static_cast<const char*>(data)] = std::max<size_t>(bytes, 1);
    return {data, data, &release, Device(DeviceType::CPU)};
  }
  static void release(void* data);
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};
PinnedAllocator pinned_allocator;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  auto at = pinned.upper_bound(static_cast<const char*>(data));
  if (at == pinned.begin()) return false;
  --at;
  return static_cast<const char*>(data) < at->first + at->second;
}

// ---- copies that are under way

struct Pending { int64_t stream, sequence; char* to; std::vector<char> content; };
std::recursive_mutex pending_mutex;
std::deque<Pending> pending;
std::atomic<int64_t> sequence{0};

void flush(int64_t of_stream, int64_t until) {  // of_stream < 0: of all
  std::lock_guard<std::recursive_mutex> lock(pending_mutex);
  for (auto at = pending.begin(); at != pending.end();) {
    if ((of_stream < 0 || at->stream == of_stream) && at->sequence <= until) {
      std::memcpy(at->to, at->content.data(), at->content.size());
      at = pending.erase(at);
    } else {
      ++at;
    }
  }
}

void flush_here() { flush(stream, INT64_MAX); }

void PinnedAllocator::release(void* data) {
  {
    std::lock_guard<std::recursive_mutex> lock(pending_mutex);
    size_t bytes;
    { std::lock_guard<std::mutex> l(pinned_mutex); bytes = pinned[static_cast<const char*>(data)]; }
    for (auto at = pending.begin(); at != pending.end();) {
      bool inside = at->to >= static_cast<char*>(data) && at->to < static_cast<char*>(data) + bytes;
      at = inside ? pending.erase(at) : std::next(at);
    }
  }
  std::lock_guard<std::mutex> lock(pinned_mutex);
  pinned.erase(static_cast<const char*>(data));
  std::free(data);
}

// ---- the guard, the generators, the hooks

struct Guard final : public impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device d) const override {
    Device old(DeviceType::CUDA, current);
    if (d.index() >= 0) current = d.index();
    return old;
  }
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  void setDevice(Device d) const override { if (d.index() >= 0) current = d.index(); }
  void uncheckedSetDevice(Device d) const noexcept override {
    if (d.index() >= 0) current = d.index();
  }
  Stream getStream(Device d) const noexcept override {
    return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, d.index() >= 0 ? d.index() : current));
  }
  Stream getNewStream(Device d, int = 0) const override { return getStream(d); }
  Stream exchangeStream(Stream s) const noexcept override { return getStream(s.device()); }
  DeviceIndex deviceCount() const noexcept override { return devices; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { flush_here(); }
  void synchronizeDevice(const DeviceIndex) const override { flush(-1, INT64_MAX); }
  void synchronizeEvent(void*) const override {}
};

struct CudaGenerator final : public GeneratorImpl {
  at::Generator inner;
  explicit CudaGenerator(int device, uint64_t seed = default_rng_seed_val)
      : GeneratorImpl(Device(DeviceType::CUDA, device), DispatchKeySet(DispatchKey::CUDA)),
        inner(at::detail::createCPUGenerator(seed)) {}
  void set_current_seed(uint64_t s) override { inner.set_current_seed(s); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const TensorImpl& s) override { inner.unsafeGetGeneratorImpl()->set_state(s); }
  intrusive_ptr<TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  GeneratorImpl* clone_impl() const override {
    auto* made = new CudaGenerator(device().index());
    made->inner = inner.clone();
    return made;
  }
};

at::Generator make_generator(int device) { return at::make_generator<CudaGenerator>(device); }

struct Hooks final : public at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return devices; }
  int getNumGPUs() const override { return devices; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex d) const override { current = d; }
  DeviceIndex exchangeDevice(DeviceIndex d) const override {
    auto before = current;
    if (d >= 0) current = d;
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return exchangeDevice(d); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  Device getDeviceFromPtr(void*) const override { return Device(DeviceType::CUDA, current); }
  at::Generator getNewGenerator(DeviceIndex d) const override {
    return make_generator(d < 0 ? current : d);
  }
  const at::Generator& getDefaultGenerator(DeviceIndex d) const override {
    static std::mutex mutex;
    static std::map<int, at::Generator> made;
    std::lock_guard<std::mutex> lock(mutex);
    auto [place, fresh] = made.try_emplace(d < 0 ? current : d);
    if (fresh) place->second = make_generator(place->first);
    return place->second;
  }
  void deviceSynchronize(DeviceIndex) const override { flush(-1, INT64_MAX); }
  std::string showConfig() const override { return "rehearsal"; }
};

// ---- the same memory as a CPU tensor

// Shares memory, and knows the whole storage, so that strides and views hold.
Tensor host(const Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  auto storage = t.storage();
  int64_t bytes = static_cast<int64_t>(storage.nbytes());
  Storage same(Storage::use_byte_size_t(), bytes,
               DataPtr(storage.mutable_data(), new Storage(storage),
                       [](void* kept) { delete static_cast<Storage*>(kept); },
                       Device(DeviceType::CPU)),
               nullptr, false);
  auto made = at::detail::make_tensor<TensorImpl>(std::move(same), DispatchKeySet(DispatchKey::CPU),
                                                  t.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.is_conj()) made._set_conj(true);
  if (t.is_neg()) made._set_neg(true);
  return made;
}

Tensor device_empty(IntArrayRef size, IntArrayRef stride, ScalarType dtype, int device) {
  int before = current;
  current = device;
  auto made = at::detail::empty_strided_generic(size, stride, &device_allocator,
                                                DispatchKeySet(DispatchKey::CUDA), dtype);
  current = before;
  return made;
}

Tensor to_device(const Tensor& cpu, int device) {  // a copy, with the same strides
  auto made = device_empty(cpu.sizes(), cpu.strides(), cpu.scalar_type(), device);
  host(made).copy_(cpu);
  return made;
}

int index_of(std::optional<Device> device) {
  TORCH_CHECK(!device || device->is_cuda(), "not a CUDA device: ", *device);
  int found = device && device->has_index() ? device->index() : current;
  TORCH_CHECK(found < devices, "CUDA error: invalid device ordinal");
  return found;
}

// ---- kernels

Tensor empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>,
             std::optional<Device> device, std::optional<bool> pin,
             std::optional<MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  int before = current;
  current = index_of(device);
  auto made = at::detail::empty_generic(size, &device_allocator, DispatchKeySet(DispatchKey::CUDA),
                                        dtype_or_default(dtype), format);
  current = before;
  return made;
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype,
                     std::optional<Layout>, std::optional<Device> device, std::optional<bool>) {
  return device_empty(size, stride, dtype_or_default(dtype), index_of(device));
}

const Tensor& resize_(const Tensor& self, IntArrayRef size, std::optional<MemoryFormat>) {
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), size, std::nullopt, true);
  return self;
}

Tensor& copy_(Tensor& self, const Tensor& src, bool non_blocking) {
  bool out = src.is_cuda() && !self.is_cuda(), in = self.is_cuda() && !src.is_cuda();
  bool pinned_target = !self.is_cuda() && is_pinned(self.const_data_ptr()) && self.is_contiguous();
  if (out && non_blocking && pinned_target && self.numel()) {
    auto ready = host(src).to(self.scalar_type()).expand(self.sizes()).contiguous();
    size_t bytes = self.nbytes();
    Pending one{stream, ++sequence, static_cast<char*>(self.mutable_data_ptr()), {}};
    auto* from = static_cast<const char*>(ready.const_data_ptr());
    one.content.assign(from, from + bytes);
    std::lock_guard<std::recursive_mutex> lock(pending_mutex);
    std::memset(self.mutable_data_ptr(), 0xFF, bytes);
    pending.push_back(std::move(one));
    return self;
  }
  if (in && non_blocking && is_pinned(src.const_data_ptr())) {
    // the stream's own earlier copies come first, on the device; the host still does not see them
    std::lock_guard<std::recursive_mutex> lock(pending_mutex);
    auto* from = static_cast<char*>(const_cast<void*>(src.const_data_ptr()));
    for (auto& one : pending) {
      if (one.to == from && one.content.size() == src.nbytes()) {
        if (one.stream != stream) {
          tell("race", "a copy to the device reads what another stream has yet to write");
        }
        auto ready = at::from_blob(one.content.data(), src.sizes(), src.options().device(kCPU));
        host(self).copy_(ready);
        return self;
      }
    }
    host(self).copy_(src);
    return self;
  }
  if (out) { flush_here(); tell("sync", "copy to the host"); }
  if (in) {
    flush_here();
    bool from_pinned = src.numel() && is_pinned(src.const_data_ptr());
    tell("sync", from_pinned ? "copy from pinned memory, blocking" : "copy from the host");
  }
  host(self).copy_(host(src));
  return self;
}

Scalar local_scalar(const Tensor& self) {
  flush_here();
  tell("sync", "item");
  return at::_local_scalar_dense(host(self));
}

Tensor& set_storage(Tensor& self, Storage source, int64_t offset, IntArrayRef size,
                    IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

Tensor& set_source(Tensor& self, Storage source) {
  int64_t count = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return at::native::set_storage_cpu_(self, std::move(source), 0, {count}, {});
}

void record_stream(Tensor&, Stream) {}

// ---- every other operator

const std::set<std::string> READS_VALUES = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::equal", "aten::is_nonzero", "aten::repeat_interleave.Tensor",
    "aten::bincount", "aten::histc", "aten::_unique", "aten::unique_dim_consecutive"};
const std::set<std::string> TAKES_HOST_INDICES = {
    "aten::index.Tensor", "aten::index.Tensor_out", "aten::index_put_", "aten::_index_put_impl_",
    "aten::index_put"};

// One call of an operator, on its way to the CPU's kernel and back.
struct Call {
  const OperatorHandle& op;
  torch::jit::Stack* stack;
  const FunctionSchema& schema;
  std::string name;
  size_t count, begin;
  int device = -1;
  std::vector<IValue> given;                        // the arguments as they came
  std::vector<std::pair<Tensor, Tensor>> written{};  // device tensor, its host alias

  Call(const OperatorHandle& op, torch::jit::Stack* stack)
      : op(op), stack(stack), schema(op.schema()), name(toString(op.operator_name())),
        count(schema.arguments().size()), begin(stack->size() - count),
        given(stack->begin() + begin, stack->end()) {}

  std::string stranger;  // the argument that lies elsewhere

  void look(const Tensor& t, bool may_be_on_host, const std::string& argument) {
    if (!t.defined()) return;
    if (t.is_cuda()) {
      if (device < 0) device = t.get_device();
      if (t.get_device() != device) stranger = argument + " is on " + t.device().str();
    } else if (t.dim() > 0 && !may_be_on_host && !t.unsafeGetTensorImpl()->is_wrapped_number()) {
      stranger = argument + " is on " + t.device().str();
    }
  }

  // Refuses tensors of two devices, and tells of waits.
  void find_device() {
    bool host_indices = TAKES_HOST_INDICES.count(name), boolean_index = false;
    for (size_t n = 0; n < count; ++n) {
      const auto& value = given[n];
      const auto& argument = schema.arguments()[n].name();
      bool index = host_indices && argument == "indices";
      if (value.isTensor()) {
        look(value.toTensor(), false, argument);
      } else if (value.isTensorList()) {
        for (const Tensor& t : value.toTensorVector()) look(t, index, argument);
      } else if (value.isOptionalTensorList()) {
        for (const std::optional<Tensor>& t : value.toOptionalTensorList()) {
          if (!t) continue;
          look(*t, index, argument);
          bool mask = t->scalar_type() == kBool || t->scalar_type() == kByte;
          if (index && t->dim() && mask) boolean_index = true;
          if (index && !t->is_cuda()) tell("sync", "index from the host");
        }
      } else if (value.isList()) {
        for (const IValue& one : value.toListRef()) {
          if (one.isTensor()) look(one.toTensor(), index, argument);
        }
      }
    }
    if (!stranger.empty()) {
      tell("mixed", name + ": " + stranger);
      TORCH_CHECK(false, "Expected all tensors to be on the same device, but got ", stranger,
                  ", different from other tensors on cuda:", device,
                  " (when checking argument in method wrapper_CUDA_", name, ")");
    }
    if (device < 0) device = current;
    if (READS_VALUES.count(name) || boolean_index) { flush_here(); tell("sync", name); }
  }

  Tensor over(const Tensor& t, bool writes) {
    // an empty one is there to be resized, which an alias cannot be
    bool on_device = t.defined() && t.is_cuda();
    auto h = writes && on_device && !t.numel() ? at::empty(t.sizes(), t.options().device(kCPU))
                                               : host(t);
    if (writes && on_device) written.emplace_back(t, h);
    return h;
  }

  at::Generator inner(const at::Generator& generator) {
    TORCH_CHECK(generator.device().is_cuda(),
                "Expected a 'cuda' device type for generator but found 'cpu'");
    TORCH_CHECK(generator.device().index() == device, "Expected generator on cuda:", device,
                " but found ", generator.device().str());
    return static_cast<CudaGenerator*>(generator.unsafeGetGeneratorImpl())->inner;
  }

  // Puts the same memory as CPU tensors in the place of the arguments.
  void arguments_to_host() {
    for (size_t n = 0; n < count; ++n) {
      auto& value = (*stack)[begin + n];
      const auto* alias = schema.arguments()[n].alias_info();
      bool writes = alias && alias->isWrite();
      if (value.isTensor()) {
        value = over(value.toTensor(), writes);
      } else if (value.isTensorList()) {
        std::vector<Tensor> made;
        for (const Tensor& t : value.toTensorVector()) made.push_back(over(t, writes));
        value = IValue(made);
      } else if (value.isOptionalTensorList()) {
        List<std::optional<Tensor>> made;
        for (const std::optional<Tensor>& t : value.toOptionalTensorList()) {
          made.push_back(t ? std::optional<Tensor>(host(*t)) : std::nullopt);
        }
        value = made;
      } else if (value.isDevice()) {
        value = Device(DeviceType::CPU);
      } else if (value.isGenerator()) {
        if (value.toGenerator().defined()) value = inner(value.toGenerator());
      } else if (value.isNone() && schema.arguments()[n].name() == "generator") {
        value = inner(at::detail::getCUDAHooks().getDefaultGenerator(device));
      }
    }
  }

  // Gives resized outputs, which have memory of their own, back to their device tensors.
  void write_back() {
    for (auto& [on_device, alias] : written) {
      if (alias.numel() && (alias.sizes() != on_device.sizes() ||
                            alias.const_data_ptr() != host(on_device).const_data_ptr())) {
        on_device.resize_(alias.sizes());
        host(on_device).copy_(alias);
      }
    }
  }

  Tensor back(const Tensor& t) {
    if (!t.defined() || t.is_cuda()) return t;
    for (auto& value : given) {  // a view of an argument
      if (!value.isTensor() || !value.toTensor().defined() || !value.toTensor().is_cuda()) continue;
      const Tensor& of = value.toTensor();
      auto* start = static_cast<const char*>(of.storage().data());
      auto* here = static_cast<const char*>(t.storage().data());
      if (start && here == start) {
        auto made = at::detail::make_tensor<TensorImpl>(
            Storage(of.storage()), DispatchKeySet(DispatchKey::CUDA), t.dtype());
        auto* view = made.unsafeGetTensorImpl();
        view->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
        return made;
      }
    }
    return to_device(t, device);
  }

  // Puts device tensors in the place of what the CPU's kernel returned.
  void returns_to_device() {
    const auto& returns = schema.returns();
    const size_t first = stack->size() - returns.size();
    for (size_t n = 0; n < returns.size(); ++n) {
      auto& value = (*stack)[first + n];
      const auto* alias = returns[n].alias_info();
      if (alias && alias->isWrite()) {  // the argument itself
        for (size_t m = 0; m < count; ++m) {
          const auto* same = schema.arguments()[m].alias_info();
          if (same && same->isWrite() && *same == *alias) { value = given[m]; break; }
        }
      } else if (value.isTensor()) {
        value = back(value.toTensor());
      } else if (value.isTensorList()) {
        std::vector<Tensor> made;
        for (const Tensor& t : value.toTensorVector()) made.push_back(back(t));
        value = IValue(made);
      }
    }
  }
};

void fallback(const OperatorHandle& op, torch::jit::Stack* stack) {
  Call call(op, stack);
  call.find_device();
  call.arguments_to_host();
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  call.write_back();
  call.returns_to_device();
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("_local_scalar_dense", TORCH_FN(local_scalar));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Storage", TORCH_FN(set_source));
  m.impl("set_", TORCH_FN(at::native::set_cpu_));
  m.impl("record_stream", TORCH_FN(record_stream));
  for (const char* name : {"convolution", "convolution_backward", "_convolution",
                           "native_layer_norm", "native_group_norm",
                           "native_group_norm_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
}

TORCH_LIBRARY(rehearsal, m) {
  m.def("host(Tensor self) -> Tensor");
  m.def("resize_storage(Tensor self, int bytes) -> ()");
}
TORCH_LIBRARY_IMPL(rehearsal, CompositeExplicitAutograd, m) {
  m.impl("host", [](const Tensor& t) { return host(t); });
  m.impl("resize_storage", [](const Tensor& t, int64_t bytes) {
    auto* storage = t.storage().unsafeGetStorageImpl();
    int before = current;
    if (t.is_cuda()) current = t.get_device();
    if (bytes == 0) {
      storage->set_data_ptr_noswap(device_allocator.allocate(0));
      storage->set_nbytes(0);
    } else {
      at::native::resize_bytes_cpu(storage, bytes);
    }
    current = before;
  });
}

namespace at { using CUDAHooks = Hooks; REGISTER_CUDA_HOOKS(CUDAHooks); }

extern "C" {
int rehearsal_start(int count, int64_t bytes) {
  devices = count;
  limit = bytes;
  SetAllocator(DeviceType::CUDA, &device_allocator);
  auto& slot = impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)];
  if (slot.load() != nullptr) return 1;
  slot.store(new Guard());
  return at::detail::getCUDAHooks().hasCUDA() ? 0 : 2;
}
void rehearsal_callback(Callback f) { callback = f; }
int rehearsal_device() { return current; }
void rehearsal_set_device(int d) { current = d; }
void rehearsal_set_stream(int64_t s) { stream = s; }
int64_t rehearsal_sequence() { return sequence; }
void rehearsal_flush(int64_t s, int64_t until) { flush(s, until < 0 ? INT64_MAX : until); }
int64_t rehearsal_pending() {
  std::lock_guard<std::recursive_mutex> lock(pending_mutex);
  return pending.size();
}
int64_t rehearsal_allocated(int d) { return counters[d].now; }
int64_t rehearsal_peak(int d) { return counters[d].peak; }
int64_t rehearsal_highest(int d) { return counters[d].highest; }
void rehearsal_reset_peak(int d) { counters[d].peak = counters[d].now.load(); }
int64_t rehearsal_limit() { return limit; }
void rehearsal_set_limit(int64_t bytes) { limit = bytes; }
}
