// Answers one question that autograd asks the CUDA driver, whether it has a context, with "no".
#include <ATen/detail/CUDAHooksInterface.h>
#include <cstdlib>
#include <cstring>

static bool never(void*, signed char) { return false; }

extern "C" void patch() {
  auto& hooks = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  bool (at::AcceleratorHooksInterface::*question)(c10::DeviceIndex) const = &at::AcceleratorHooksInterface::hasPrimaryContext;
  long offset;  // of the question in the table of virtual functions, as the Itanium ABI stores it: plus one
  std::memcpy(&offset, &question, sizeof(offset));
  const int length = 120;
  void*** object = reinterpret_cast<void***>(&hooks);
  void** table = static_cast<void**>(std::malloc(sizeof(void*) * (length + 2)));
  std::memcpy(table, *object - 2, sizeof(void*) * (length + 2));
  table[2 + (offset - 1) / sizeof(void*)] = reinterpret_cast<void*>(&never);
  *object = table + 2;
}
