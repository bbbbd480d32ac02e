// The sm80 linear layers against float64, rows against themselves in other company and in other tiles. Runs on the host
// model, and on a GPU where it is built for one.
#include "linear_cases.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

constexpr LinearOp kOps[] = {LinearOp::kFp8, LinearOp::kFp4, LinearOp::kGrouped, LinearOp::kDense};
constexpr const char* kNames[] = {"fp8_linear", "fp4_linear", "grouped_linear", "dense_linear"};
constexpr const char* kTileNames[] = {"few", "some", "many", "group"};

void check_case(const LinearCase& c, const LinearTile* tile = nullptr) {
  const std::string wrong = try_linear(c, tile);
  const auto text = [](int64_t value) { return std::to_string(value) + " "; };
  CHECK_MESSAGE(wrong.empty(), std::string(kNames[static_cast<int>(c.op)]) + " tokens " + text(c.tokens) + "groups " +
                                   text(c.groups) + "in " + text(c.inputs) + "out " + text(c.outputs) + "wide x " +
                                   text(c.wide_x) + "wide scales " + text(c.wide_scales) + "pad " + text(c.pad) +
                                   (tile != nullptr ? kTileNames[static_cast<int>(*tile)] : "") + ": " + wrong);
}

void check_tiles(const LinearCase& c) {
  for (const LinearTile& tile : tiles_of(c)) check_case(c, &tile);
}

TEST(nothing_to_do) {
  if (no_device()) return;
  for (const LinearOp op : kOps) {
    check_case({op, 0, 128, 20});
    check_case({op, 3, 128, 0});
    check_tiles({op, 3, 0, 20});
  }
}

TEST(token_counts) {
  if (no_device()) return;
  for (const LinearOp op : kOps) {
    for (const int64_t tokens : {1, 2, 7, 8, 9, 31, 33, 65, 129}) check_case({op, tokens, 160, 20});
    for (const int64_t tokens : {1, 17, 130}) check_tiles({op, tokens, 128, 16});
  }
}

TEST(output_counts) {
  if (no_device()) return;
  for (const LinearOp op : kOps) {
    for (const int64_t outputs : {1, 15, 17, 31, 33, 127, 129, 260}) check_case({op, 3, 128, outputs});
    check_tiles({op, 5, 128, 131});
  }
}

// Blocks of 128 of K beyond what the warps and the stages share, and all remainders of a block.
TEST(input_counts) {
  if (no_device()) return;
  for (const LinearOp op : kOps) {
    for (const int64_t inputs : {2, 16, 30, 32, 34, 126, 130, 254, 256, 258, 640, 1026, 1664}) {
      check_tiles({op, 3, inputs, 18});
    }
  }
}

TEST(operands_of_every_type) {
  if (no_device()) return;
  for (const LinearOp op : kOps) {
    for (int types = 0; types < 8; ++types) {
      for (const int64_t inputs : {150, 352}) {
        LinearCase c = {op, 6, inputs, 33, 1, (types & 1) != 0, (types & 2) != 0, (types & 4) != 0};
        if (op == LinearOp::kGrouped) c.wide_out = c.wide_x;
        check_tiles(c);
      }
    }
  }
}

TEST(groups) {
  if (no_device()) return;
  for (const bool wide : {false, true}) {
    check_tiles({LinearOp::kGrouped, 4, 160, 40, 3, wide, false, wide});  // rows of a group cross a scale's block
    check_tiles({LinearOp::kGrouped, 10, 128, 128, 2, wide, true, wide});
    check_case({LinearOp::kGrouped, 37, 96, 17, 5, wide, false, wide});
  }
}

TEST(rows_that_do_not_lie_densely) {
  if (no_device()) return;
  for (const LinearOp op : kOps) {
    for (const int64_t pad : {1, 3, 8, 16, 32}) check_tiles({op, 5, 160, 20, 1, false, false, true, pad});
    check_tiles({op, 1, 160, 20, 1, false, false, true, 3});
    check_tiles({op, 5, 160, 20, 1, true, true, true, 5});
  }
}

// Each operand and result alone: what is believed of one must not be concluded from another.
TEST(any_operand_anywhere_in_memory) {
  if (no_device()) return;
  for (const LinearOp op : kOps) {
    for (const bool wide : {false, true}) {
      each_odd_tensor([&] { check_tiles({op, 3, 160, 20, 1, wide, wide, wide}); });
    }
  }
}

#if !defined(DSV4_ON_GPU)

TEST(offsets_beyond_32_bits) {
  const RowsApart apart;
  for (const LinearOp op : kOps) {
    for (const bool wide : {false, true}) check_tiles({op, 9, 136, 300, 1, wide, wide, wide});
  }
}

#endif

// Operands and results that start at no multiple of 16 bytes.
TEST(memory_may_start_anywhere) {
  if (no_device()) return;
  for (const LinearOp op : kOps) {
    LinearProblem whole({op, 3, 256, 20, 1, false, false, true, 32});
    LinearProblem moved({op, 3, 256, 20, 1, false, false, true, 32});
    CHECK(whole.run().empty());
    for (int64_t t = 0; t < 3; ++t) {
      for (int64_t i = 256; i > 0; --i) moved.narrow_x.at(t, i) = moved.narrow_x.at(t, i - 1);
    }
    for (int64_t row = 0; row < 20; ++row) {
      for (int64_t i = 256; i > 0 && op == LinearOp::kDense; --i) {
        moved.narrow_weight.at(row, i) = moved.narrow_weight.at(row, i - 1);
      }
      for (int64_t i = moved.columns; i > 0 && op != LinearOp::kDense; --i) {
        moved.codes.at(row, i) = moved.codes.at(row, i - 1);
      }
    }
    moved.upload();
    for (const LinearTile& tile : tiles_of(whole.c)) {
      std::string fault;
      if (op == LinearOp::kDense) {
        DenseLinearParams p = moved.dense_params();
        p.x.data = static_cast<bf16*>(p.x.data) + 1;
        p.weight.data = static_cast<bf16*>(p.weight.data) + 1;
        p.out.data = static_cast<float*>(p.out.data) + 1;
        fault = moved.run(p, &tile);
      } else {
        LinearParams p = moved.params();
        p.x.data = static_cast<bf16*>(p.x.data) + 1;
        p.weight.data = static_cast<uint8_t*>(p.weight.data) + 1;
        p.out.data = static_cast<float*>(p.out.data) + 1;
        fault = moved.run(p, &tile);
      }
      CHECK_MESSAGE(fault.empty(), fault);
      for (int64_t t = 0; t < 3; ++t) {
        for (int64_t i = 0; i < 20; ++i) CHECK(moved.wide_out.at(t, i + 1) == whole.wide_out.at(t, i));
      }
    }
  }
}

TEST(a_row_does_not_depend_on_tile_or_company) {
  if (no_device()) return;
  for (const LinearOp op : kOps) {
    for (const bool wide : {false, true}) {
      LinearCase c = {op, 35, 1410, 21, op == LinearOp::kGrouped ? 2 : 1, wide, wide, true};
      LinearProblem all(c);
      CHECK(all.run(&kEveryTile[2]).empty());
      for (const LinearTile& tile : tiles_of(c)) {
        for (const int64_t tokens : {1, 9, 35}) {
          LinearCase few = c;
          few.tokens = tokens;
          LinearProblem p(few);
          CHECK(p.run(&tile).empty());
          for (int64_t t = 0; t < tokens; ++t) {
            CHECK_MESSAGE(p.bits_of(t) == all.bits_of(t), std::string("tile ") + kTileNames[static_cast<int>(tile)]);
          }
        }
      }
      // The same row elsewhere, between rows of NaN.
      LinearProblem moved(c);
      for (int64_t i = 0; i < c.groups * c.inputs; ++i) {
        moved.set_x(33, i, wide ? moved.wide_x.at(2, i) : to_float(moved.narrow_x.at(2, i)));
        moved.set_x(32, i, NAN);
        moved.set_x(34, i, NAN);
      }
      moved.upload();
      CHECK(moved.run(&kEveryTile[1]).empty());
      CHECK(moved.bits_of(33) == all.bits_of(2));
      CHECK(std::isnan(moved.out_at(32, 0)) && std::isnan(moved.out_at(34, 20)));
    }
  }
}

// Every code of a weight, alone in its row, at every place of a block.
TEST(codes) {
  if (no_device()) return;
  for (const LinearOp op : {LinearOp::kFp8, LinearOp::kFp4}) {
    for (const bool wide : {false, true}) {
      LinearProblem p({op, 2, 256, 256, 1, false, wide});
      for (int64_t row = 0; row < 256; ++row) {
        for (int64_t i = 0; i < p.columns; ++i) p.codes.at(row, i) = 0;
        p.codes.at(row, row * (op == LinearOp::kFp8 ? 5 : 7) % p.columns) = static_cast<uint8_t>(row);
      }
      p.upload();
      for (const LinearTile& tile : tiles_of(p.c)) {
        CHECK(p.run(&tile).empty());
        const std::string wrong = p.wrong();
        CHECK_MESSAGE(wrong.empty(), wrong);
        CHECK(op == LinearOp::kFp4 || (std::isnan(p.out_at(0, 0x7F)) && std::isnan(p.out_at(1, 0xFF))));
      }
    }
  }
}

// Scales at the ends of what there is, and far from each other within a block.
TEST(scales) {
  if (no_device()) return;
  for (const LinearOp op : {LinearOp::kFp8, LinearOp::kFp4}) {
    LinearProblem p({op, 2, 256, 140});
    for (int64_t row = 0; row < p.scale_rows; ++row) {
      for (int64_t i = 0; i < p.scale_columns; ++i) {
        p.scale.at(row, i) = static_cast<uint8_t>(row % 3 == 0   ? (i % 2 == 0 ? 20 : 21)
                                                  : row % 3 == 1 ? (i % 4 == 1 ? 200 : 100)
                                                                 : 100 + 7 * i);
      }
    }
    if (op == LinearOp::kFp4) p.scale.at(7, 5) = 0xFF;
    p.upload();
    for (const LinearTile& tile : tiles_of(p.c)) {
      CHECK(p.run(&tile).empty());
      const std::string wrong = p.wrong();
      CHECK_MESSAGE(wrong.empty(), wrong);
      CHECK(op == LinearOp::kFp8 || std::isnan(p.out_at(0, 7)));
    }
  }
}

// The quantiser: blocks of zeros, of tiny and of huge values, an infinity, a NaN.
TEST(activations_of_every_size) {
  if (no_device()) return;
  for (const LinearOp op : {LinearOp::kFp8, LinearOp::kFp4}) {
    for (const bool wide : {false, true}) {
      LinearProblem p({op, 9, 384, 20, 1, wide});
      for (int64_t i = 0; i < 384; ++i) {
        p.set_x(0, i, 0.0f);
        p.set_x(1, i, -0.0f);
        p.set_x(2, i, i % 128 == 3 ? 1e-5f : 1e-9f);
        p.set_x(3, i, i == 200 ? 3e35f : 1.0f);
        p.set_x(6, i, static_cast<float>(i % 128 - 64) * 7.03125f);  // halfway between codes
      }
      p.set_x(4, 130, INFINITY);
      p.set_x(5, 383, NAN);
      p.upload();
      CHECK(p.run().empty());
      const std::string wrong = p.wrong();
      CHECK_MESSAGE(wrong.empty(), wrong);
      CHECK(std::isnan(p.out_at(4, 3)) && std::isnan(p.out_at(5, 3)) && p.out_at(0, 3) == 0);
    }
  }
}

// float32 values of every size go through three bfloat16 numbers without loss.
TEST(wide_operands_keep_their_bits) {
  if (no_device()) return;
  LinearProblem p({LinearOp::kDense, 12, 128, 16, 1, true, true});
  for (int64_t t = 0; t < 12; ++t) {
    for (int64_t i = 0; i < 128; ++i)
      p.set_x(t, i, i == 5 * t ? std::ldexp(1.0f + 0x1p-23f * 12345 * t, 8 * t - 50) : 0);
  }
  for (int64_t row = 0; row < 16; ++row) {
    for (int64_t i = 0; i < 128; ++i) p.set_weight(row, i, row == 0 ? 1.0f : row == 1 ? -0.0f : 1.0f / row);
  }
  p.upload();
  for (const LinearTile& tile : tiles_of(p.c)) {
    CHECK(p.run(&tile).empty());
    for (int64_t t = 0; t < 12; ++t) CHECK(p.out_at(t, 0) == p.wide_x.at(t, 5 * t));
    const std::string wrong = p.wrong();
    CHECK_MESSAGE(wrong.empty(), wrong);
  }
}

// The list of candidates leads here.
TEST(the_op_runs_the_kernel) {
  if (no_device()) return;
  for (const LinearOp op : kOps) {
    const LinearCase c = {op, 4, 256, 40};
    LinearProblem direct(c), dispatched(c);
    CHECK(direct.run().empty());
    const Context context = cuda_context();
    Status status = Status::ok();
    if (op == LinearOp::kDense) {
      status = dense_linear(dispatched.dense_params(), context);
    } else {
      LinearParams p = dispatched.params();
      using Bytes = int64_t (*)(const LinearParams&, const Context&);
      using Run = Status (*)(const LinearParams&, const Context&);
      constexpr Bytes kBytes[] = {fp8_linear_workspace_bytes, fp4_linear_workspace_bytes,
                                  grouped_linear_workspace_bytes};
      constexpr Run kRun[] = {fp8_linear, fp4_linear, grouped_linear};
      const int64_t bytes = kBytes[static_cast<int>(op)](p, context);
      CHECK(bytes == 4 * 256 * 2);
      DeviceBytes workspace(static_cast<size_t>(bytes) + 64);
      p.workspace = {reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.device()) + 63) / 64 * 64), bytes};
      status = kRun[static_cast<int>(op)](p, context);
      CHECK(finish_device());
    }
    CHECK_MESSAGE(status.is_ok(), status.message());
    dispatched.wide_out.download();
    for (int64_t t = 0; t < c.tokens; ++t) CHECK(dispatched.bits_of(t) == direct.bits_of(t));
  }
}

TEST(a_small_workspace_is_refused) {
  if (no_device()) return;
  LinearProblem p({LinearOp::kFp8, 3, 130, 20});
  LinearParams params = p.params();
  const int64_t needed = sm80::quantised_linear_workspace_bytes(params, cuda_context());
  DeviceBytes workspace(static_cast<size_t>(needed));
  params.workspace = {workspace.device(), needed - 1};
  CHECK(std::string(sm80::fp8_linear(params, cuda_context()).message()) ==
        "fp8_linear: workspace has 1535 bytes, needs 1536");
}

}  // namespace
