// What the library for torch does when it is loaded (cuda_device.py).
//
// torch asks the guard of a tensor's device before it looks at the tensor. Builds without CUDA have none for "cuda",
// and that of builds with CUDA wants a driver; this one does nothing, so that there can be tensors that say so. Threads
// take turns, which is fastest: races are the business of the native tests.
#include <c10/core/impl/DeviceGuardImplInterface.h>

#if defined(DSV4_PTX_MACHINE)
#include "machine/control.h"
#else
#include "simt/control.h"
#endif

namespace {

using c10::DeviceType;
using Guard = c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA>;

[[maybe_unused]] const bool prepared = [] {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(new Guard());
#if defined(DSV4_PTX_MACHINE)
  dsv4::machine::trust_the_host();
#else
  dsv4::simt::Options options;
  options.schedule = dsv4::simt::Schedule::kRoundRobin;
  dsv4::simt::configure(options);
#endif
  return true;
}();

}  // namespace
