// Accesses of the kernels to shared memory, on the host model: none takes more cycles than its width needs, but for
// those named here.
#include "attention_backward_cases.h"
#include "compress_backward_cases.h"
#include "index_cases.h"
#include "linear_cases.h"
#include "mhc_backward_cases.h"
#include "moe_backward_cases.h"
#include "quantize_cases.h"
#include "simt/control.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

// No line of `attempt` takes more than `most` times its cycles without conflicts; some line reads or writes shared
// memory.
template <class Attempt>
void check_banks(const std::string& what, const Attempt& attempt, double most = 1) {
  simt::Options options;
  options.count_banks = true;
  simt::configure(options);
  simt::forget_bank_sites();
  const std::string fault = attempt();
  simt::configure({});
  CHECK_MESSAGE(fault.empty(), what + ": " + fault);
  CHECK(!simt::bank_sites().empty());
  for (const simt::BankSite& site : simt::bank_sites()) {
    const double cycles = static_cast<double>(site.cycles) / static_cast<double>(site.phases);
    CHECK_MESSAGE(cycles <= most, what + ": " + site.file + ":" + std::to_string(site.line) + ", " +
                                      std::to_string(site.bytes) + " bytes a lane, takes " + std::to_string(cycles) +
                                      " times its cycles");
  }
}

AttentionCase attention(int64_t heads, int64_t head_dim, int64_t rope_dim, RowForm rows) {
  AttentionCase c;
  c.runs = {{300, 1}};
  c.heads = heads;
  c.head_dim = head_dim;
  c.rope_dim = rope_dim;
  c.window = 128;
  c.k = 128;
  c.window_rows = c.entry_rows = rows;
  c.f32_query = rows == RowForm::kF32;
  return c;
}

// Of the eight threads of a key in blocks of 32 heads, four store rope dims while the others store codes: two
// instructions of a GPU, which are taken together here since one line of Bf16Tile makes both.
TEST(attention) {
  for (const int64_t head_dim : {128, 512}) {
    for (const int heads : {16, 64}) {
      const int block = heads == 16 ? 16 : 32;
      const std::string what = std::to_string(heads) + " heads of " + std::to_string(head_dim);
      check_banks(
          what, [&] { return try_attention(attention(heads, head_dim, 64, RowForm::kFp8), block); },
          block == 32 ? 1.34 : 1);
      check_banks(what, [&] { return try_attention(attention(heads, head_dim, 64, RowForm::kBf16), block); });
      check_banks(what, [&] { return try_attention(attention(heads, head_dim, 64, RowForm::kF32), 16); });
    }
  }
}

TEST(attention_backward) {
  for (const int64_t head_dim : {128, 512}) {
    for (const RowForm rows : {RowForm::kBf16, RowForm::kF32}) {
      for (const int block : {16, 32}) {
        check_banks("gradient", [&] { return try_attention_backward(attention(20, head_dim, 64, rows), block); });
      }
    }
  }
}

TEST(index) {
  for (const IndexKeyFormat format : {IndexKeyFormat::kFp4, IndexKeyFormat::kFp8, IndexKeyFormat::kBFloat16}) {
    for (const int64_t tokens : {1, 64}) {
      check_banks("index", [&] { return try_index({tokens, 64, 128, 32, format, 64, 4, 2, true}); });
    }
  }
}

// FP4 codes in the largest tiles are read twice, eight bytes a lane, which meet half of the banks: their sums leave no
// registers to keep codes in.
TEST(linears) {
  for (const LinearOp op : {LinearOp::kFp8, LinearOp::kFp4, LinearOp::kGrouped, LinearOp::kDense}) {
    for (const bool wide : {false, true}) {
      for (const LinearTile& tile : tiles_of({op, 70, 512, 128, 1, wide, wide})) {
        const std::string what = "op " + std::to_string(static_cast<int>(op)) + " tile " +
                                 std::to_string(static_cast<int>(tile)) + (wide ? " float32" : "");
        const bool many = tile == LinearTile::kMany && op == LinearOp::kFp4 && !wide;
        check_banks(what, [&] { return try_linear({op, 70, 512, 128, 1, wide, wide, false}, &tile); }, many ? 2 : 1);
      }
    }
  }
}

// Lanes without a token leave out their part of a pass, and are counted with the next. Many tokens of FP4 experts: as
// linears.
TEST(experts) {
  for (const WeightFormat format : {WeightFormat::kPlain, WeightFormat::kFp8, WeightFormat::kFp4}) {
    for (const sm80::SharedTile tile : {sm80::SharedTile::kFew, sm80::SharedTile::kSome, sm80::SharedTile::kMany}) {
      const bool many = tile == sm80::SharedTile::kMany;
      const sm80::ExpertCut cut = {4096, many, tile, !many};
      const MoeCase c = {40, 256, 136, 3, 2, format, format, format, 128};
      check_banks(
          "format " + std::to_string(static_cast<int>(format)), [&] { return try_moe<bf16>(c, &cut); },
          many && format == WeightFormat::kFp4 ? 2 : 1.1);
    }
  }
}

TEST(gradients_of_experts) {
  for (const bool many : {false, true}) {
    const sm80::GradientCut cut = {many, many, !many, 256};
    const GradientCase c = {140, 136, 72, 1, 1, 0};
    check_banks("bfloat16", [&] { return try_gradient<bf16>(c, &cut); });
    check_banks("float32", [&] { return try_gradient<float>(c, &cut); });
  }
}

TEST(hyper_connections) {
  for (const MhcOp op : {MhcOp::kPre, MhcOp::kPostPre, MhcOp::kHead}) {
    for (const int64_t tokens : {16, 128}) {
      check_banks("bfloat16", [&] { return try_mhc<bf16>({tokens, 512, true}, op); });
    }
    check_banks("float32", [&] { return try_mhc<float>({128, 512, true}, op); });
  }
}

TEST(gradients_of_hyper_connections) {
  for (const MhcBackwardOp op : kBackwardOps) {
    check_banks("bfloat16", [&] { return try_mhc_backward<bf16>({128, 256, true, true}, op); });
    check_banks("float32", [&] { return try_mhc_backward<float>({128, 256, true, true}, op); });
  }
}

TEST(rows) {
  check_banks("rms_norm", [] { return try_norm<bf16>({4, 4096}); });
  for (const int64_t ratio : {4, 128}) {
    const int64_t sets = ratio == 4 ? 2 : 1;
    check_banks("entries", [&] { return try_entries<bf16>({ratio, 512, 64, sets}, 2 * ratio); });
    check_banks("keys", [&] { return try_entries<bf16>({ratio, 128, 64, sets}, 2 * ratio, true); });
  }
}

TEST(gradients_of_rows) {
  for (const int64_t rows : {9, 300}) {
    check_banks("rms_norm", [&] { return try_norm_gradient<bf16>({rows, 1024}); });
    check_banks("kv_norm_rope", [&] { return try_norm_gradient<float>({rows, 1032, 64}); });
  }
  check_banks("entries", [] { return try_entries_gradient<bf16>({21, 4, 512, 64, 2}); });
  check_banks("entries", [] { return try_entries_gradient<float>({260, 128, 512, 64, 1}); });
}

// Of more than 1,024 dims, which no model here has: neighbours at a distance below a warp's meet in pairs.
TEST(long_rotations) {
  check_banks("hadamard", [] { return try_hadamard<bf16>({4, 2048}, false); }, 1.5);
}

}  // namespace
