// cvt: between integers and floats, and into the packed codes.
#include <cmath>
#include <limits>
#include <type_traits>

#include "common/dtype.h"
#include "instructions.h"
#include "warp.h"

namespace dsv4::machine {

namespace {

// A register may be wider than the type that an instruction takes from it or puts into it.
template <class T>
T read(Warp& w, Slot slot, int register_bytes, int lane) {
  if (register_bytes == sizeof(T)) return w.lanes<T>(slot)[lane];
  if (register_bytes < static_cast<int>(sizeof(T))) throw Fault("a register narrower than what is taken from it");
  if (register_bytes == 8) return static_cast<T>(w.lanes<uint64_t>(slot)[lane]);
  return static_cast<T>(w.lanes<uint32_t>(slot)[lane]);
}

template <class To, class From>
To converted(From value) {
  if constexpr (std::is_floating_point_v<From> && std::is_integral_v<To>) {  // towards zero; what does not fit, nearest
    if (std::isnan(value)) return 0;
    constexpr auto low = std::numeric_limits<To>::min(), high = std::numeric_limits<To>::max();
    if (value <= static_cast<From>(low)) return low;
    if (value >= static_cast<From>(high)) return high;
  }
  return static_cast<To>(value);
}

template <class To, class From>
void convert(Warp& w, const Instruction& i, uint32_t lanes) {
  if (i.out_bytes == sizeof(To) && i.in_bytes[0] == sizeof(From)) {
    To* out = w.lanes<To>(i.out[0]);
    const From* in = w.lanes<From>(i.in[0]);
    each(lanes, [&](int l) { out[l] = converted<To>(in[l]); });
    return;
  }
  each(lanes, [&](int l) {
    const To value = converted<To>(read<From>(w, i.in[0], i.in_bytes[0], l));
    if (i.out_bytes == sizeof(To)) {
      w.lanes<To>(i.out[0])[l] = value;
    } else if constexpr (std::is_integral_v<To>) {  // extended by its sign
      if (i.out_bytes != 4) throw Fault("a conversion into a register of another width");
      w.lanes<uint32_t>(i.out[0])[l] = static_cast<uint32_t>(static_cast<int64_t>(value));
    } else {
      throw Fault("a float in a register of another width");
    }
  });
}

void saturate(Warp& w, const Instruction& i, uint32_t lanes) {
  float* out = w.lanes<float>(i.out[0]);
  const float* in = w.lanes<float>(i.in[0]);
  each(lanes, [&](int l) { out[l] = in[l] > 0.0f ? (in[l] < 1.0f ? in[l] : 1.0f) : 0.0f; });  // NaN is 0
}

// The first operand is the upper half.
void pack_bf16(Warp& w, const Instruction& i, uint32_t lanes) {
  const float *high = w.lanes<float>(i.in[0]), *low = w.lanes<float>(i.in[1]);
  uint32_t* out = w.lanes<uint32_t>(i.out[0]);
  each(lanes, [&](int l) {
    const uint32_t upper = bf16_from_float(high[l]).bits;
    out[l] = upper << 16 | bf16_from_float(low[l]).bits;
  });
}

void pack_e4m3(Warp& w, const Instruction& i, uint32_t lanes) {
  const float *high = w.lanes<float>(i.in[0]), *low = w.lanes<float>(i.in[1]);
  uint16_t* out = w.lanes<uint16_t>(i.out[0]);
  each(lanes, [&](int l) { out[l] = static_cast<uint16_t>(e4m3_code(high[l]) << 8 | e4m3_code(low[l])); });
}

template <class To>
void add_integers_to(Operations& all, const std::string& to) {
  all["cvt." + to + ".s16"] = {convert<To, int16_t>};
  all["cvt." + to + ".u16"] = {convert<To, uint16_t>};
  all["cvt." + to + ".s32"] = {convert<To, int32_t>};
  all["cvt." + to + ".u32"] = {convert<To, uint32_t>};
  all["cvt." + to + ".s64"] = {convert<To, int64_t>};
  all["cvt." + to + ".u64"] = {convert<To, uint64_t>};
  all["cvt." + to + ".s8"] = {convert<To, int8_t>};
  all["cvt." + to + ".u8"] = {convert<To, uint8_t>};
  all["cvt.rzi." + to + ".f32"] = {convert<To, float>};
  all["cvt.rzi." + to + ".f64"] = {convert<To, double>};
}

template <class To>
void add_floats_to(Operations& all, const std::string& to) {
  all["cvt.rn." + to + ".s16"] = {convert<To, int16_t>};
  all["cvt.rn." + to + ".u16"] = {convert<To, uint16_t>};
  all["cvt.rn." + to + ".s32"] = {convert<To, int32_t>};
  all["cvt.rn." + to + ".u32"] = {convert<To, uint32_t>};
  all["cvt.rn." + to + ".s64"] = {convert<To, int64_t>};
  all["cvt.rn." + to + ".u64"] = {convert<To, uint64_t>};
}

}  // namespace

void add_conversions(Operations& all) {
  add_integers_to<int16_t>(all, "s16");
  add_integers_to<uint16_t>(all, "u16");
  add_integers_to<int32_t>(all, "s32");
  add_integers_to<uint32_t>(all, "u32");
  add_integers_to<int64_t>(all, "s64");
  add_integers_to<uint64_t>(all, "u64");
  add_floats_to<float>(all, "f32");
  add_floats_to<double>(all, "f64");
  all["cvt.rn.f32.f64"] = {convert<float, double>};
  all["cvt.f64.f32"] = {convert<double, float>};
  all["cvt.sat.f32.f32"] = {saturate};
  all["cvt.rn.bf16x2.f32"] = {pack_bf16};
  all["cvt.rn.satfinite.e4m3x2.f32"] = {pack_e4m3};
}

}  // namespace dsv4::machine
