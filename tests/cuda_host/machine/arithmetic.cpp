// Integers, floats, predicates: lane by lane.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "common/dtype.h"
#include "instructions.h"
#include "warp.h"

namespace dsv4::machine {

namespace {

template <class R, class A, class F>
void unary(Warp& w, const Instruction& i, uint32_t lanes) {
  R* out = w.lanes<R>(i.out[0]);
  const A* a = w.lanes<A>(i.in[0]);
  each(lanes, [&](int l) { out[l] = static_cast<R>(F()(a[l])); });
}

template <class R, class A, class B, class F>
void binary(Warp& w, const Instruction& i, uint32_t lanes) {
  R* out = w.lanes<R>(i.out[0]);
  const A* a = w.lanes<A>(i.in[0]);
  const B* b = w.lanes<B>(i.in[1]);
  each(lanes, [&](int l) { out[l] = static_cast<R>(F()(a[l], b[l])); });
}

template <class R, class A, class C, class F>
void ternary(Warp& w, const Instruction& i, uint32_t lanes) {
  R* out = w.lanes<R>(i.out[0]);
  const A* a = w.lanes<A>(i.in[0]);
  const A* b = w.lanes<A>(i.in[1]);
  const C* c = w.lanes<C>(i.in[2]);
  each(lanes, [&](int l) { out[l] = static_cast<R>(F()(a[l], b[l], c[l])); });
}

template <class T, class F>
void compare(Warp& w, const Instruction& i, uint32_t lanes) {
  const T* a = w.lanes<T>(i.in[0]);
  const T* b = w.lanes<T>(i.in[1]);
  uint32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= (F()(a[l], b[l]) ? 1u : 0u) << l;
  uint32_t& out = w.bits(i.out[0]);
  out = (out & ~lanes) | (bits & lanes);
}

template <class T>
void select(Warp& w, const Instruction& i, uint32_t lanes) {
  T* out = w.lanes<T>(i.out[0]);
  const T* a = w.lanes<T>(i.in[0]);
  const T* b = w.lanes<T>(i.in[1]);
  const uint32_t condition = w.bits(i.in[2]);
  each(lanes, [&](int l) { out[l] = (condition >> l & 1u) != 0 ? a[l] : b[l]; });
}

template <class F>
void predicates(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t bits = F()(w.bits(i.in[0]), i.in.size() > 1 ? w.bits(i.in[1]) : 0u);
  uint32_t& out = w.bits(i.out[0]);
  out = (out & ~lanes) | (bits & lanes);
}

template <class From, class To>
To bits_as(From from) {
  static_assert(sizeof(From) == sizeof(To));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

struct Same {
  template <class T>
  T operator()(T a) const {
    return a;
  }
};
// Signed integers wrap, as unsigned ones do.
struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(a + b);
  }
};
struct Subtract {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(a - b);
  }
};
struct Multiply {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (sizeof(T) == 2) return static_cast<T>(1u * a * b);  // which int would not hold
    return static_cast<T>(a * b);
  }
};
struct MultiplyAdd {
  template <class T>
  T operator()(T a, T b, T c) const {
    return static_cast<T>(Multiply()(a, b) + c);
  }
};
template <class Wide>
struct MultiplyWide {
  template <class T>
  Wide operator()(T a, T b) const {
    return static_cast<Wide>(static_cast<Wide>(a) * static_cast<Wide>(b));
  }
};
template <class Wide>
struct MultiplyHigh {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> (8 * sizeof(T)));
  }
};
struct Divide {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) {
      if (b == 0) throw Fault("division by zero");
      if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(-a);
    }
    return static_cast<T>(a / b);
  }
};
struct Remainder {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) throw Fault("division by zero");
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
  }
};
struct Minimum {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>) {
      if (std::isnan(a)) return b;
      if (std::isnan(b)) return a;
      if (a == b) return std::signbit(a) ? a : b;
    }
    return a < b ? a : b;
  }
};
struct Maximum {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>) {
      if (std::isnan(a)) return b;
      if (std::isnan(b)) return a;
      if (a == b) return std::signbit(a) ? b : a;
    }
    return a > b ? a : b;
  }
};
struct And {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(a | b);
  }
};
struct Xor {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(a ^ b);
  }
};
struct Not {
  template <class T>
  T operator()(T a) const {
    return static_cast<T>(~a);
  }
  uint32_t operator()(uint32_t a, uint32_t) const { return ~a; }
};
struct First {
  uint32_t operator()(uint32_t a, uint32_t) const { return a; }
};
struct Negate {
  template <class T>
  T operator()(T a) const {
    return static_cast<T>(-a);
  }
};
struct Absolute {
  template <class T>
  T operator()(T a) const {
    return std::fabs(a);
  }
};
// Amounts from the width on leave nothing, or the sign.
struct ShiftLeft {
  template <class T>
  T operator()(T a, uint32_t n) const {
    return n < 8 * sizeof(T) ? static_cast<T>(a << n) : T{0};
  }
};
struct ShiftRight {
  template <class T>
  T operator()(T a, uint32_t n) const {
    const uint32_t most = 8 * sizeof(T) - 1;
    if (n > most) return std::is_signed_v<T> ? static_cast<T>(a >> most) : T{0};
    return static_cast<T>(a >> n);
  }
};
struct CountOnes {
  uint32_t operator()(uint32_t a) const { return static_cast<uint32_t>(__builtin_popcount(a)); }
};
struct Fma {
  template <class T>
  T operator()(T a, T b, T c) const {
    return std::fma(a, b, c);
  }
};
struct SquareRoot {
  template <class T>
  T operator()(T a) const {
    return std::sqrt(a);
  }
};
struct Reciprocal {
  template <class T>
  T operator()(T a) const {
    return T{1} / a;
  }
};

// The float next to the exact value value + rest in the direction of down (-inf) or zero.
float rounded(double value, double rest, bool down) {
  const auto nearest = static_cast<float>(value);
  if (!std::isfinite(nearest)) return nearest;
  const bool above = static_cast<double>(nearest) > value || (static_cast<double>(nearest) == value && rest < 0);
  const bool below = static_cast<double>(nearest) < value || (static_cast<double>(nearest) == value && rest > 0);
  if (above && (down || value > 0)) return std::nextafter(nearest, -std::numeric_limits<float>::infinity());
  if (below && !down && value < 0) return std::nextafter(nearest, std::numeric_limits<float>::infinity());
  return nearest;
}
// The error of a sum of doubles.
double rest_of_sum(double a, double b, double sum) {
  const double part = sum - a;
  return (a - (sum - part)) + (b - part);
}
struct FmaDown {
  float operator()(float a, float b, float c) const {
    const double product = static_cast<double>(a) * b, sum = product + c;
    if (sum == 0) return std::signbit(product) || std::signbit(c) ? -0.0f : 0.0f;
    return rounded(sum, rest_of_sum(product, c, sum), true);
  }
};
struct AddToZero {
  float operator()(float a, float b) const {
    const double sum = static_cast<double>(a) + b;
    return rounded(sum, rest_of_sum(a, b, sum), false);
  }
};
// Denormals count as zeros, before and after; within 2 ulp on a GPU.
struct Exponential2 {
  static float flushed(float a) {
    return std::fabs(a) < std::numeric_limits<float>::min() ? std::copysign(0.0f, a) : a;
  }
  float operator()(float a) const { return flushed(static_cast<float>(std::exp2(static_cast<double>(flushed(a))))); }
};

// a b + c in bfloat16, rounded once: through a float rounded to odd.
uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {
  const double product = static_cast<double>(float_from_bits(a << 16)) * float_from_bits(b << 16);
  const double addend = float_from_bits(c << 16), sum = product + addend;
  // The sign of a zero is the sum's; a sum of two zeros needs no rounding.
  float odd = static_cast<float>(sum);
  if (std::isfinite(odd) && (static_cast<double>(odd) != sum || rest_of_sum(product, addend, sum) != 0)) {
    uint32_t bits = bits_from_float(odd);
    if (std::fabs(static_cast<double>(odd)) > std::fabs(sum)) --bits;
    odd = float_from_bits(bits | 1u);
  }
  return bf16_from_float(odd).bits;
}
struct FmaBf16Pairs {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
    return fma_bf16(a & 0xFFFFu, b & 0xFFFFu, c & 0xFFFFu) | fma_bf16(a >> 16, b >> 16, c >> 16) << 16;
  }
};

// Bytes of a (0 to 3) and b (4 to 7); the selector's nibbles, of which bit 3 asks for the sign alone.
struct Permute {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t selector) const {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t out = 0;
    for (int n = 0; n < 4; ++n) {
      const uint32_t nibble = selector >> (4 * n) & 15u;
      uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7u))) & 0xFFu;
      if ((nibble & 8u) != 0) byte = (byte & 0x80u) != 0 ? 0xFFu : 0u;
      out |= byte << (8 * n);
    }
    return out;
  }
};

// The lowest `length` bits of a in place of b's from `position` on.
template <class T>
void insert_bits(Warp& w, const Instruction& i, uint32_t lanes) {
  T* out = w.lanes<T>(i.out[0]);
  const T *a = w.lanes<T>(i.in[0]), *b = w.lanes<T>(i.in[1]);
  const uint32_t *position = w.lanes<uint32_t>(i.in[2]), *length = w.lanes<uint32_t>(i.in[3]);
  each(lanes, [&](int l) {
    const uint32_t from = position[l] & 0xFFu, count = length[l] & 0xFFu;
    const T low = count >= 8 * sizeof(T) ? ~T{0} : static_cast<T>((T{1} << count) - 1);
    const T mask = from >= 8 * sizeof(T) ? T{0} : static_cast<T>(low << from);
    out[l] = static_cast<T>((b[l] & ~mask) | (from >= 8 * sizeof(T) ? T{0} : (a[l] << from) & mask));
  });
}

struct Equal {
  template <class T>
  bool operator()(T a, T b) const {
    return a == b;
  }
};
struct NotEqual {  // and ordered
  template <class T>
  bool operator()(T a, T b) const {
    return a < b || a > b;
  }
};
struct Less {
  template <class T>
  bool operator()(T a, T b) const {
    return a < b;
  }
};
struct LessEqual {
  template <class T>
  bool operator()(T a, T b) const {
    return a <= b;
  }
};
struct Greater {
  template <class T>
  bool operator()(T a, T b) const {
    return a > b;
  }
};
struct GreaterEqual {
  template <class T>
  bool operator()(T a, T b) const {
    return a >= b;
  }
};
struct Unordered {
  template <class T>
  bool operator()(T a, T b) const {
    return std::isnan(a) || std::isnan(b);
  }
};
template <class F>
struct OrUnordered {
  template <class T>
  bool operator()(T a, T b) const {
    return Unordered()(a, b) || F()(a, b);
  }
};

template <class T>
void add_comparisons(Operations& all, const std::string& type) {
  all["setp.eq." + type] = {compare<T, Equal>};
  all["setp.ne." + type] = {compare<T, NotEqual>};
  all["setp.lt." + type] = {compare<T, Less>};
  all["setp.le." + type] = {compare<T, LessEqual>};
  all["setp.gt." + type] = {compare<T, Greater>};
  all["setp.ge." + type] = {compare<T, GreaterEqual>};
  if constexpr (std::is_floating_point_v<T>) {
    all["setp.equ." + type] = {compare<T, OrUnordered<Equal>>};
    all["setp.neu." + type] = {compare<T, OrUnordered<NotEqual>>};
    all["setp.ltu." + type] = {compare<T, OrUnordered<Less>>};
    all["setp.leu." + type] = {compare<T, OrUnordered<LessEqual>>};
    all["setp.gtu." + type] = {compare<T, OrUnordered<Greater>>};
    all["setp.geu." + type] = {compare<T, OrUnordered<GreaterEqual>>};
    all["setp.nan." + type] = {compare<T, Unordered>};
  }
}

template <class S, class Wide>
void add_integers(Operations& all, const std::string& bits) {
  using U = std::make_unsigned_t<S>;
  for (const char* sign : {"s", "u"}) {
    const std::string type = sign + bits;
    all["add." + type] = {binary<U, U, U, Add>};
    all["sub." + type] = {binary<U, U, U, Subtract>};
    all["mul.lo." + type] = {binary<U, U, U, Multiply>};
    all["mad.lo." + type] = {ternary<U, U, U, MultiplyAdd>};
    all["neg." + type] = {unary<U, U, Negate>};
  }
  all["div.s" + bits] = {binary<S, S, S, Divide>};
  all["div.u" + bits] = {binary<U, U, U, Divide>};
  all["rem.s" + bits] = {binary<S, S, S, Remainder>};
  all["rem.u" + bits] = {binary<U, U, U, Remainder>};
  all["min.s" + bits] = {binary<S, S, S, Minimum>};
  all["min.u" + bits] = {binary<U, U, U, Minimum>};
  all["max.s" + bits] = {binary<S, S, S, Maximum>};
  all["max.u" + bits] = {binary<U, U, U, Maximum>};
  all["shr.s" + bits] = {binary<S, S, uint32_t, ShiftRight>};
  all["shr.u" + bits] = {binary<U, U, uint32_t, ShiftRight>};
  all["shl.b" + bits] = {binary<U, U, uint32_t, ShiftLeft>};
  all["mul.hi.s" + bits] = {binary<S, S, S, MultiplyHigh<Wide>>};
  all["and.b" + bits] = {binary<U, U, U, And>};
  all["or.b" + bits] = {binary<U, U, U, Or>};
  all["xor.b" + bits] = {binary<U, U, U, Xor>};
  all["not.b" + bits] = {unary<U, U, Not>};
  add_comparisons<S>(all, "s" + bits);
  add_comparisons<U>(all, "u" + bits);
  all["setp.eq.b" + bits] = {compare<U, Equal>};
  all["setp.ne.b" + bits] = {compare<U, NotEqual>};
  for (const char* type : {"s", "u", "b", "f"}) {
    all["mov." + (type + bits)] = {unary<U, U, Same>};
    all["selp." + (type + bits)] = {select<U>};
  }
}

template <class T>
void add_floats(Operations& all, const std::string& type) {
  for (const char* rounding : {".", ".rn."}) {
    all["add" + (rounding + type)] = {binary<T, T, T, Add>};
    all["sub" + (rounding + type)] = {binary<T, T, T, Subtract>};
    all["mul" + (rounding + type)] = {binary<T, T, T, Multiply>};
  }
  all["fma.rn." + type] = {ternary<T, T, T, Fma>};
  all["div.rn." + type] = {binary<T, T, T, Divide>};
  all["sqrt.rn." + type] = {unary<T, T, SquareRoot>};
  all["rcp.rn." + type] = {unary<T, T, Reciprocal>};
  all["neg." + type] = {unary<T, T, Negate>};
  all["abs." + type] = {unary<T, T, Absolute>};
  all["min." + type] = {binary<T, T, T, Minimum>};
  all["max." + type] = {binary<T, T, T, Maximum>};
  add_comparisons<T>(all, type);
}

// Two halves of a register, the lower first.
template <class Whole, class Half>
void join(Warp& w, const Instruction& i, uint32_t lanes) {
  Whole* out = w.lanes<Whole>(i.out[0]);
  const Half *low = w.lanes<Half>(i.in[0]), *high = w.lanes<Half>(i.in[1]);
  each(lanes, [&](int l) { out[l] = static_cast<Whole>(low[l] | static_cast<Whole>(high[l]) << (8 * sizeof(Half))); });
}
template <class Whole, class Half>
void split(Warp& w, const Instruction& i, uint32_t lanes) {
  Half *low = w.lanes<Half>(i.out[0]), *high = w.lanes<Half>(i.out[1]);
  const Whole* in = w.lanes<Whole>(i.in[0]);
  each(lanes, [&](int l) {
    const Whole whole = in[l];
    low[l] = static_cast<Half>(whole);
    high[l] = static_cast<Half>(whole >> (8 * sizeof(Half)));
  });
}

}  // namespace

void add_arithmetic(Operations& all) {
  add_integers<int16_t, int32_t>(all, "16");
  add_integers<int32_t, int64_t>(all, "32");
  add_integers<int64_t, __int128>(all, "64");
  all["mul.wide.s16"] = {binary<int32_t, int16_t, int16_t, MultiplyWide<int32_t>>};
  all["mul.wide.u16"] = {binary<uint32_t, uint16_t, uint16_t, MultiplyWide<uint32_t>>};
  all["mul.wide.s32"] = {binary<int64_t, int32_t, int32_t, MultiplyWide<int64_t>>};
  all["mul.wide.u32"] = {binary<uint64_t, uint32_t, uint32_t, MultiplyWide<uint64_t>>};
  all["popc.b32"] = {unary<uint32_t, uint32_t, CountOnes>};
  all["prmt.b32"] = {ternary<uint32_t, uint32_t, uint32_t, Permute>};
  all["bfi.b32"] = {insert_bits<uint32_t>};
  all["bfi.b64"] = {insert_bits<uint64_t>};

  add_floats<float>(all, "f32");
  add_floats<double>(all, "f64");
  all["fma.rm.f32"] = {ternary<float, float, float, FmaDown>};
  all["add.rz.f32"] = {binary<float, float, float, AddToZero>};
  all["ex2.approx.ftz.f32"] = {unary<float, float, Exponential2>};
  all["fma.rn.bf16x2"] = {ternary<uint32_t, uint32_t, uint32_t, FmaBf16Pairs>};

  all["and.pred"] = {predicates<And>};
  all["or.pred"] = {predicates<Or>};
  all["xor.pred"] = {predicates<Xor>};
  all["not.pred"] = {predicates<Not>};
  all["mov.pred"] = {predicates<First>};

  all["mov.b64.join"] = {join<uint64_t, uint32_t>};
  all["mov.b32.join"] = {join<uint32_t, uint16_t>};
  all["mov.b64.split"] = {split<uint64_t, uint32_t>};
  all["mov.b32.split"] = {split<uint32_t, uint16_t>};
  all["cvta.to.global.u64"] = {unary<uint64_t, uint64_t, Same>};
  all["cvta.global.u64"] = {unary<uint64_t, uint64_t, Same>};
  all["bra"] = all["bra.uni"] = {nullptr, Kind::kBranch};
  all["ret"] = {nullptr, Kind::kExit};
}

}  // namespace dsv4::machine
