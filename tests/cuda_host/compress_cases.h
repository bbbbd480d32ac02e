// compress problems for the CUDA kernels, and the scalar kernel's answers.
#pragma once

#include "cpu/compressor.h"
#include "cpu/scalar/rows.h"
#include "cuda/sm80/compress.h"
#include "row_cases.h"

namespace dsv4::testing {

// A sequence's rows: positions [first, first + rows).
struct CompressRun {
  int64_t sequence, first, rows;
};

struct CompressCase {
  int64_t ratio, dim, rope_dim, sets;
  PageFormat format = PageFormat::kFp8Rows;
  bool wide_weight = false;  // norm_weight, and so the entries, in float32
  bool exact = true;         // weights 0 and 1, whole values: pooling is the same in any arithmetic
  int64_t page_size = 3, spare = 1;
  int64_t shift = 0;  // elements by which operands begin off 16 bytes
  std::vector<CompressRun> runs = {{1, 0, 23}, {0, 5, 14}, {3, 2, 1}, {2, 0, 9}};
  uint64_t seed = 1;
};

struct CompressProblem {
  static constexpr int64_t kSequences = 4;

  CompressCase c;
  int64_t tokens, channels, ring;
  DeviceTensor<float> kv, gate, ape, rope, wide_weight, state;
  DeviceTensor<bf16> narrow_weight;
  DeviceTensor<int32_t> sequence, position;
  PoolMemory pool;
  std::vector<float> expected_state;

  static int64_t count(const CompressCase& c) {
    int64_t rows = 0;
    for (const CompressRun& run : c.runs) rows += run.rows;
    return rows;
  }
  static int64_t blocks(const CompressCase& c) {
    int64_t most = 1;
    for (const CompressRun& run : c.runs) most = std::max(most, (run.first + run.rows) / c.ratio / c.page_size + 1);
    return most;
  }

  explicit CompressProblem(const CompressCase& the_case)
      : c(the_case),
        tokens(count(c)),
        channels(c.sets * c.dim),
        ring(c.sets * c.ratio + c.spare),
        kv({tokens, channels}, c.shift),
        gate({tokens, channels}, c.shift),
        ape({c.ratio, channels}, c.shift),
        rope({tokens, c.rope_dim / 2, 2}, c.shift),
        wide_weight({c.dim}),
        state({kSequences, ring, 2, channels}, c.shift),
        narrow_weight({c.dim}),
        sequence({tokens}),
        position({tokens}),
        pool(c.format, kSequences, blocks(c), c.page_size, c.dim, c.rope_dim, c.shift * 4) {
    fill_rows();
    Random random(c.seed);
    for (int64_t row = 0; row < c.ratio; ++row) {
      for (int64_t i = 0; i < channels; ++i) ape.at(row, i) = gate_value(random, 1);
    }
    narrow_weight.fill(random, -1.5f, 1.5f);
    wide_weight.fill(random, -1.5f, 1.5f);
    // What no position lies in is NaN.
    for (const CompressRun& run : c.runs) {
      for (int64_t slot = 0; slot < std::min(run.first, ring); ++slot) {
        for (int64_t i = 0; i < channels; ++i) {
          state.at(run.sequence, slot * 2 * channels + i) = value(random);
          state.at(run.sequence, (slot * 2 + 1) * channels + i) = gate_value(random, 4);
        }
      }
    }
    ape.upload();
    state.upload();
    for (int64_t s = 0; s < kSequences; ++s) {
      expected_state.insert(expected_state.end(), &state.at(s), &state.at(s) + state_stride());
    }
  }

  int64_t state_stride() const { return state.inner() + c.shift; }  // of expected_state
  float value(Random& random) const {
    const float x = random.uniform(-8, 8);
    return !c.exact ? x : std::round(x) == 0 ? 1.0f : std::round(x);  // sums that are zero have one sign
  }
  // Exact: so far apart that the softmax is 0 or, of equals, their share.
  float gate_value(Random& random, float size) const {
    return c.exact ? (random.bits() >> 20) % 2 * 2000.0f : random.uniform(-size, size);
  }

  // A row's data depends on its sequence and position alone.
  void fill_rows() {
    int64_t t = 0;
    for (const CompressRun& run : c.runs) {
      for (int64_t i = 0; i < run.rows; ++i, ++t) {
        const int64_t at = run.first + i;
        Random random(c.seed * 1000003 + static_cast<uint64_t>(run.sequence * 100000 + at));
        for (int64_t d = 0; d < channels; ++d) kv.at(t, d) = value(random), gate.at(t, d) = gate_value(random, 4);
        for (int64_t d = 0; d + 1 < c.rope_dim; d += 2) {
          const float angle = static_cast<float>(at / c.ratio * c.ratio * (d + 1)) * 0.1f;
          rope.at(t, d) = std::cos(angle);
          rope.at(t, d + 1) = std::sin(angle);
        }
        sequence.at(t) = static_cast<int32_t>(run.sequence);
        position.at(t) = static_cast<int32_t>(at);
      }
    }
    for (DeviceTensor<float>* tensor : {&kv, &gate, &rope}) tensor->upload();
    sequence.upload();
    position.upload();
  }

  // On the host pages and state are the expected ones. Rows [first, first + rows).
  CompressParams params(bool on_host, int64_t first, int64_t rows) {
    const auto from = [&](DeviceTensor<float>& tensor) {
      AnyView<2> any = view_of<2>(tensor, on_host);
      View<const float, 2> view = any.as<const float>();
      return view;
    };
    const auto cut = [&](auto view) {
      view.data =
          static_cast<char*>(const_cast<void*>(static_cast<const void*>(view.data))) + first * view.stride[0] * 4;
      view.shape[0] = rows;
      return view;
    };
    AnyView<4> kept = view_of<4>(state, on_host);
    if (on_host) kept.data = expected_state.data(), kept.stride[0] = state_stride();
    CompressParams p = {cut(view_of<2>(kv, on_host)).template as<const float>(),
                        cut(view_of<2>(gate, on_host)).template as<const float>(),
                        from(ape),
                        c.wide_weight ? view_of<1>(wide_weight, on_host) : view_of<1>(narrow_weight, on_host),
                        cut(view_of<3>(rope, on_host)),
                        kept.as<float>(),
                        pool.pool(on_host),
                        cut(view_of<1>(sequence, on_host)),
                        cut(view_of<1>(position, on_host)),
                        c.ratio,
                        1e-5,
                        c.format == PageFormat::kFp4Keys || c.format == PageFormat::kFp8Keys || rotated,
                        {}};
    return p;
  }
  bool rotated = false;  // plain pages of keys

  // What went wrong, or nothing. rows_per_block 0: what the op takes.
  std::string run(int64_t first, int64_t rows, int rows_per_block = 0) {
    const CompressParams p = params(false, first, rows);
    const sm80::CompressRows rows_of_block = {rows_per_block, rows_per_block};
    const Status status =
        sm80::compress(p, rows_per_block > 0 ? rows_of_block : sm80::compress_rows_per_block(p), cuda_context());
    if (!status.is_ok()) return status.message();
    if (!finish_device()) return "the kernel failed";
    state.download();
    pool.pages.download();
    const bool intact = kv.intact() && gate.intact() && ape.intact() && rope.intact() && state.intact();
    return intact && sequence.intact() && position.intact() ? "" : "wrote outside of state and pages";
  }
  std::string run(int rows_per_block = 0) { return run(0, tokens, rows_per_block); }

  void expect() {
    CompressParams p = params(true, 0, tokens);
    std::vector<double> memory(static_cast<size_t>(compress_slots_bytes(p, scalar_context())) / 8 + 1);
    p.workspace = {memory.data(), compress_slots_bytes(p, scalar_context())};
    const Status status = c.wide_weight ? compress_rows<float>(scalar::Lanes(), p, scalar_context())
                                        : compress_rows<bf16>(scalar::Lanes(), p, scalar_context());
    CHECK_MESSAGE(status.is_ok(), status.message());
  }

  std::string wrong_state() {
    for (int64_t s = 0; s < kSequences; ++s) {
      for (int64_t i = 0; i < state_stride(); ++i) {
        const float got = state.at(s, i), wanted = expected_state[static_cast<size_t>(s * state_stride() + i)];
        if (memcmp(&got, &wanted, 4) != 0) return "state " + std::to_string(s) + " element " + std::to_string(i);
      }
    }
    return "";
  }
  // After `expect`: the bits of the scalar kernel, of exact problems.
  std::string wrong() {
    const std::string bytes = pool.wrong_bytes(), kept = wrong_state();
    return bytes.empty() ? kept : bytes;
  }

  // Of problems that are not exact: pooling in float32 moves a value over a rounding edge now and then, of float32
  // pages a little.
  std::string wrong_roughly() {
    int64_t different = 0, written = 0;
    for (int64_t page = 0; page < pool.pages.rows(); ++page) {
      float largest = 0;
      for (int64_t i = 0; i < pool.pages.inner(); ++i) {
        const size_t at = static_cast<size_t>(page * pool.pages.inner() + i);
        written += pool.expected[at] != 0x5A;
        different += pool.expected[at] != pool.pages.at(page, i);
      }
      for (int64_t i = 0; c.format == PageFormat::kFloat32 && i < c.page_size * c.dim; ++i) {
        const size_t at = static_cast<size_t>(page * pool.pages.inner() + 4 * i);
        float wanted, got;
        memcpy(&wanted, &pool.expected[at], 4);
        memcpy(&got, &pool.pages.at(page, 4 * i), 4);
        if (wanted == got) continue;
        largest = std::max(largest, std::fabs(wanted - got));
      }
      if (!(largest < 3e-6f)) return "page " + std::to_string(page) + ": off by " + std::to_string(largest);
    }
    if (c.format != PageFormat::kFloat32 && different > 2 + written / 1000) {
      return std::to_string(different) + " of " + std::to_string(written) + " bytes differ";
    }
    return wrong_state();
  }
};

inline std::string try_compress(const CompressCase& c, int rows_per_block = 0, bool rotated = false) {
  CompressProblem p(c);
  p.rotated = rotated;
  const std::string fault = p.run(rows_per_block);
  if (!fault.empty()) return fault;
  p.expect();
  return c.exact ? p.wrong() : p.wrong_roughly();
}

// One whole sequence: compress_entries gives the bits that compress stores of it in plain pages, which try_compress
// compares with the scalar kernel.
template <class N>
std::string try_entries(const CompressCase& one, int64_t tokens, bool rotated = false, int rows_per_block = 0) {
  const int64_t entries = tokens / one.ratio;
  CompressCase c = one;
  c.format = sizeof(N) == 2 ? PageFormat::kBFloat16 : PageFormat::kFloat32;
  c.wide_weight = sizeof(N) == 4;
  c.page_size = entries + 1;
  c.runs = {{0, 0, tokens}};
  CompressProblem p(c);
  p.rotated = rotated;
  std::string fault = p.run();
  if (!fault.empty()) return fault;
  p.expect();
  fault = c.exact ? p.wrong() : p.wrong_roughly();
  if (!fault.empty()) return fault;

  DeviceTensor<float> rope({entries, c.rope_dim / 2, 2}, c.shift);
  for (int64_t j = 0; j < entries; ++j) {
    for (int64_t d = 0; d < c.rope_dim; ++d) rope.at(j, d) = p.rope.at(j * c.ratio, d);
  }
  rope.upload();
  DeviceTensor<N> result({entries, c.dim}, c.shift);
  const CompressParams of = p.params(false, 0, tokens);
  const CompressEntriesParams params = {of.kv,   of.gate, of.ape,    of.norm_weight,           rope.any<3>(),
                                        c.ratio, of.eps,  of.rotate, result.template any<2>(), {}};
  const Status status = rows_per_block > 0 ? sm80::compress_entries(params, rows_per_block, cuda_context())
                                           : compress_entries(params, cuda_context());
  if (!status.is_ok()) return status.message();
  if (!finish_device()) return "the kernel failed";
  result.download();
  if (!result.intact() || !rope.intact()) return "wrote outside of the result";
  p.pool.pages.download();
  const int64_t page = p.pool.table.at(0, 0);
  for (int64_t j = 0; j < entries; ++j) {
    const int64_t from = p.pool.shift + j * c.dim * static_cast<int64_t>(sizeof(N));
    if (memcmp(&result.at(j), &p.pool.pages.at(page, from), static_cast<size_t>(c.dim) * sizeof(N)) != 0) {
      return "entry " + std::to_string(j) + " is not what compress stores";
    }
  }
  return "";
}

}  // namespace dsv4::testing
