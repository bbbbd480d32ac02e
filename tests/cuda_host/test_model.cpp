// The host model against planted faults: each must be named, and the sound version of the same kernel must pass.
// test_ptx.cu has what the instructions compute.
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <set>

#include "buffer.h"
#include "cuda/common/launch.h"
#include "cuda/common/ptx.h"
#include "simt/block.h"
#include "simt/control.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

using Kernel = std::function<void()>;

cuda::LaunchShape shape_of(int threads, int shared_bytes = 1024) {
  cuda::LaunchShape shape;
  shape.threads = threads;
  shape.shared_bytes = shared_bytes;
  return shape;
}

std::string fault_of(const Kernel& kernel, int threads, int seed) {
  simt::Options options;
  options.seed = static_cast<uint64_t>(seed);
  options.schedule = static_cast<simt::Schedule>(seed % 3);
  simt::configure(options);
  const Status status = simt::run("kernel", shape_of(threads), kernel);
  simt::configure({});
  return status.is_ok() ? "" : status.message();
}

constexpr int kSeeds = 30;

void check_sound(const Kernel& kernel, int threads) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    const std::string fault = fault_of(kernel, threads, seed);
    CHECK_MESSAGE(fault.empty(), fault);
  }
}

// In every order of threads the fault is found, and reported with one of the words and this file's name.
void check_faulty(const std::vector<std::string>& words, const Kernel& kernel, int threads) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    const std::string fault = fault_of(kernel, threads, seed);
    bool named = false;
    for (const std::string& word : words) named = named || fault.find(word) != std::string::npos;
    CHECK_MESSAGE(named, "expected '" + words[0] + "', got '" + fault + "'");
    CHECK_MESSAGE(fault.find("test_model.cpp:") != std::string::npos, fault);
  }
}

uint32_t word(int index) { return ptx::shared_base() + static_cast<uint32_t>(4 * index); }

// Writes its own word, reads the neighbour's, and writes again.
void exchange(bool before_read, bool before_write, int threads) {
  const int t = ptx::thread_index();
  ptx::store_shared_float(word(t), static_cast<float>(t));
  if (before_read) ptx::sync_threads();
  const float other = ptx::load_shared_float(word((t + 1) % threads));
  if (before_write) ptx::sync_threads();
  ptx::store_shared_float(word(t), other + 1.0f);
}

TEST(a_missing_barrier_is_a_race) {
  for (const int threads : {32, 64, 96}) {
    check_sound([=] { exchange(true, true, threads); }, threads);
    check_faulty(
        {"RACE: read", "never written", "may still be reading", "RACE: write"}, [=] { exchange(false, true, threads); },
        threads);
    check_faulty({"may still be reading", "RACE: read"}, [=] { exchange(true, false, threads); }, threads);
  }
}

TEST(two_writers_race) {
  check_faulty({"RACE: write"}, [] { ptx::store_shared_float(word(0), 1.0f); }, 2);
  check_sound(
      [] {
        if (ptx::thread_index() == 0) ptx::store_shared_float(word(0), 1.0f);
        ptx::sync_threads();
        if (ptx::thread_index() == 1) ptx::store_shared_float(word(0), 2.0f);
      },
      2);
}

// Bytes of one 16-byte piece that differ are no race.
TEST(neighbours_in_a_piece_do_not_race) {
  check_sound(
      [] {
        const int t = ptx::thread_index();
        ptx::store_shared_float(word(t), 1.0f);
        ptx::load_shared_float(word(t));
        ptx::store_shared_float(word(t), 2.0f);
      },
      64);
}

// Every reader since the last write counts, also when others of its warp read the same bytes after it.
TEST(a_writer_waits_for_every_reader) {
  std::mt19937_64 random(1);
  simt::SharedMemory memory;
  memory.reset(64, random);
  const uint32_t address = memory.base();
  float value = 1.0f;
  uint32_t clock[4] = {1, 1, 1, 1};  // of a thread that knows all before time 1 to be over
  CHECK(memory.store(3, clock, address, &value, 4).empty());
  uint32_t late[3] = {2, 2, 2};
  for (int thread = 0; thread < 3; ++thread) {
    uint32_t reader[4] = {1, 1, 1, 1};
    reader[thread] = late[thread];
    CHECK(memory.load(thread, reader, address, &value, 4).empty());
  }
  for (int missing = 0; missing < 3; ++missing) {
    uint32_t writer[4] = {2, 2, 2, 5};
    writer[missing] = 1;
    CHECK(memory.store(3, writer, address, &value, 4).find("may still be reading") != std::string::npos);
    CHECK(memory.store(3, writer, address + 4, &value, 4).empty());
  }
  uint32_t writer[4] = {2, 2, 2, 5};
  CHECK(memory.store(3, writer, address, &value, 4).empty());
  // Someone who comes after that write need not know of the reads before it.
  uint32_t next[4] = {0, 0, 0, 5};
  CHECK(memory.store(2, next, address, &value, 4).empty());
}

void pass_on(bool sync, bool shuffle) {
  const int t = ptx::thread_index();
  ptx::store_shared_float(word(t), 1.0f);
  if (sync) ptx::sync_warp();
  if (shuffle) ptx::shuffle_xor(1.0f, 1);
  ptx::load_shared_float(word(t ^ 1));
}

TEST(sync_warp_orders_memory_and_shuffles_do_not) {
  check_sound([] { pass_on(true, false); }, 64);
  check_faulty({"RACE: read", "never written"}, [] { pass_on(false, true); }, 64);
  check_faulty(
      {"RACE: read", "never written"},
      [] {
        ptx::store_shared_float(word(ptx::thread_index()), 1.0f);
        ptx::sync_warp();
        ptx::load_shared_float(word(ptx::thread_index() ^ 32));
      },
      64);
}

void matrix_of(bool sync) {
  const int t = ptx::thread_index();
  ptx::store_shared_16(ptx::shared_base() + static_cast<uint32_t>(16 * t), ptx::Words4{});
  if (sync) ptx::sync_warp();
  uint32_t matrix[4];
  ptx::ldmatrix_x4(matrix, ptx::shared_base() + static_cast<uint32_t>(16 * t));
}

TEST(ldmatrix_needs_the_lanes_stores) {
  check_sound([] { matrix_of(true); }, 32);
  check_faulty({"RACE: read"}, [] { matrix_of(false); }, 32);
}

TEST(ldmatrix_counts_bank_conflicts) {
  const auto conflicts = [](int row_bytes) {
    simt::counters() = {};
    const Status status = simt::run("kernel", shape_of(32, 4096), [=] {
      const uint32_t row = ptx::shared_base() + static_cast<uint32_t>(ptx::thread_index() * row_bytes);
      ptx::store_shared_16(row, ptx::Words4{});
      ptx::sync_warp();
      uint32_t matrix[4];
      ptx::ldmatrix_x4(matrix, row);
    });
    CHECK(status.is_ok());
    return simt::counters().bank_conflicts;
  };
  CHECK(conflicts(16) == 0);
  CHECK(conflicts(32) == 16);   // rows pair up
  CHECK(conflicts(128) == 28);  // all eight in one bank group, four times
  CHECK(conflicts(80) == 0);
}

// Lane l reads `bytes` at l times `stride`, some lanes alone at all.
double bank_cycles(int bytes, int stride, int lanes = 32) {
  simt::Options options;
  options.count_banks = true;
  simt::configure(options);
  simt::forget_bank_sites();
  const Status status = simt::run("kernel", shape_of(32, 4096), [=] {
    const int t = ptx::thread_index();
    for (int i = 0; i < 32; ++i)
      ptx::store_shared_float(ptx::shared_base() + static_cast<uint32_t>(4 * (32 * i + t)), 0);
    ptx::sync_warp();
    const uint32_t from = ptx::shared_base() + static_cast<uint32_t>(stride * t);
    if (t >= lanes) return;
    if (bytes == 4) ptx::load_shared_float(from);
    if (bytes == 8) ptx::load_shared_8(from);
    if (bytes == 16) ptx::load_shared_16(from);
  });
  simt::configure({});
  CHECK_MESSAGE(status.is_ok(), status.message());
  const auto sites = simt::bank_sites();  // by line: the stores first
  CHECK(sites.size() == 2 && sites[0].phases == 32 && sites[0].cycles == 32);
  return sites.size() == 2 ? static_cast<double>(sites[1].cycles) / static_cast<double>(sites[1].phases) : 0;
}

TEST(bank_conflicts_of_every_width) {
  CHECK(bank_cycles(4, 4) == 1);
  CHECK(bank_cycles(4, 0) == 1);  // one word for all
  CHECK(bank_cycles(4, 8) == 2);
  CHECK(bank_cycles(4, 12) == 1);
  CHECK(bank_cycles(4, 128) == 32);
  CHECK(bank_cycles(4, 128, 5) == 5);
  CHECK(bank_cycles(8, 8) == 1);
  CHECK(bank_cycles(8, 16) == 2);
  CHECK(bank_cycles(16, 16) == 1);
  CHECK(bank_cycles(16, 32) == 2);
  CHECK(bank_cycles(16, 80) == 1);
  CHECK(bank_cycles(16, 112) == 1);
}

alignas(16) const uint32_t source[8] = {1, 2, 3, 4, 5, 6, 7, 8};
alignas(8) uint8_t bytes[8] = {};

void copy(bool commit, bool wait, bool barrier) {
  const int t = ptx::thread_index();
  if (t == 0) ptx::cp_async_16(ptx::shared_base(), source, 16);
  if (commit) ptx::cp_async_commit();
  if (wait) ptx::cp_async_wait<0>();
  if (barrier) ptx::sync_threads();
  ptx::load_shared_16(ptx::shared_base());
  if (t == 0) ptx::cp_async_commit();
  if (t == 0) ptx::cp_async_wait<0>();
}

TEST(a_copy_is_there_after_wait_and_barrier_alone) {
  check_sound([] { copy(true, true, true); }, 64);
  const std::vector<std::string> early = {"on its way", "never written"};
  check_faulty({"on its way"}, [] { copy(false, true, true); }, 64);
  check_faulty({"on its way"}, [] { copy(true, false, true); }, 64);
  check_faulty(
      {"RACE: read", "on its way", "never written", "may still be reading"}, [] { copy(true, true, false); }, 64);
}

TEST(wait_leaves_the_newest_groups_pending) {
  const auto two = [](int read) {
    return [=] {
      ptx::cp_async_16(word(0), source, 16);
      ptx::cp_async_commit();
      ptx::cp_async_16(word(4), source + 4, 16);
      ptx::cp_async_commit();
      ptx::cp_async_wait<1>();
      ptx::load_shared_16(word(read));
      ptx::cp_async_wait<0>();
    };
  };
  check_sound(two(0), 1);
  check_faulty({"on its way"}, two(4), 1);
}

TEST(copies_conflict_with_other_accesses) {
  // Refilled while another thread may still read.
  check_faulty(
      {"may still be reading", "RACE: read", "on its way", "RACE: write", "never written"},
      [] {
        const int t = ptx::thread_index();
        if (t == 0) ptx::store_shared_16(word(0), ptx::Words4{});
        ptx::sync_threads();
        if (t == 1) ptx::load_shared_16(word(0));
        if (t == 0) ptx::cp_async_16(word(0), source, 16);
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
      },
      2);
  check_faulty(
      {"write to smem+0x0 while"},
      [] {
        ptx::cp_async_16(word(0), source, 16);
        ptx::store_shared_float(word(0), 1.0f);
      },
      1);
  check_faulty({"did not wait for"}, [] { ptx::cp_async_16(word(0), source, 16); }, 1);
}

TEST(shared_memory_starts_unwritten_and_has_ends) {
  check_faulty({"never written"}, [] { ptx::load_shared_float(word(3)); }, 1);
  check_faulty({"outside the 1024 bytes"}, [] { ptx::store_shared_float(word(256), 1.0f); }, 1);
  check_faulty({"outside the 1024 bytes"}, [] { ptx::store_shared_float(word(-1), 1.0f); }, 1);
  check_faulty({"misaligned"}, [] { ptx::store_shared_16(word(1), ptx::Words4{}); }, 1);
  check_faulty({"misaligned global"}, [] { ptx::load_global_16(source + 1); }, 1);
  check_faulty({"misaligned global"}, [] { ptx::load_global_8(source + 1); }, 1);
  check_faulty({"misaligned global"}, [] { ptx::load_global_4(bytes + 1); }, 1);
  check_faulty({"misaligned global"}, [] { ptx::store_global_4(bytes + 2, 0); }, 1);
}

TEST(a_block_that_cannot_go_on_says_who_waits) {
  check_faulty(
      {"threads 0..31 (32) wait in sync_threads"},
      [] {
        if (ptx::thread_index() < 32) ptx::sync_threads();
      },
      64);
  check_faulty({"wait in sync_named"}, [] { ptx::sync_named<1, 96>(); }, 64);
  check_faulty(
      {"wait in shuffle"},
      [] {
        if (ptx::thread_index() != 5) ptx::shuffle_xor(1.0f, 1);
      },
      32);
}

TEST(lanes_must_meet_at_one_line) {
  check_faulty(
      {"diverged"},
      [] {
        if (ptx::thread_index() % 2 == 0) {
          ptx::shuffle_xor(1.0f, 1);
        } else {
          ptx::shuffle_xor(1.0f, 2);
        }
      },
      32);
  check_faulty(
      {"different barriers"},
      [] {
        if (ptx::thread_index() % 2 == 0) {
          ptx::sync_threads();
        } else {
          ptx::sync_threads();
        }
      },
      32);
  check_faulty(
      {"without all its lanes"},
      [] {
        if (ptx::thread_index() % 64 < 48 && ptx::thread_index() / 64 == 0) ptx::sync_named<1, 64>();
        if (ptx::thread_index() >= 112) ptx::sync_named<1, 64>();
      },
      128);
  check_faulty({"fewer than 32 lanes"}, [] { ptx::shuffle_xor(1.0f, 1); }, 40);
}

TEST(seeds_change_the_order_and_nothing_else_does) {
  std::set<std::vector<int>> orders;
  for (int seed = 0; seed < kSeeds; ++seed) {
    std::vector<int> first, second;
    for (std::vector<int>* order : {&first, &second}) {
      CHECK(fault_of([=] { order->push_back(ptx::thread_index()); }, 64, seed).empty());
    }
    CHECK(first == second);
    CHECK(first.size() == 64);
    orders.insert(first);
  }
  CHECK(orders.size() >= kSeeds * 2 / 3);  // in turn is one order; the other schedules differ
}

TEST(a_line_can_be_left_out) {
  simt::forget_sites();
  check_sound([] { exchange(true, true, 64); }, 64);
  const std::vector<simt::SyncSite> sites = simt::sites_met();
  CHECK(sites.size() == 2);
  for (const simt::SyncSite& site : sites) {
    CHECK(site.kind == "sync_threads");
    simt::Options options;
    options.skip_file = site.file.c_str();
    options.skip_line = site.line;
    simt::configure(options);
    CHECK(!simt::run("kernel", shape_of(64), [] { exchange(true, true, 64); }).is_ok());
    simt::configure({});
  }
}

TEST(impossible_launches_are_refused) {
  const Kernel nothing = [] {};
  CHECK(simt::run("kernel", shape_of(1024), nothing).is_ok());
  CHECK(!simt::run("kernel", shape_of(1025), nothing).is_ok());
  CHECK(!simt::run("kernel", shape_of(32, cuda::kMaxSharedBytes + 16), nothing).is_ok());
  cuda::LaunchShape shape = shape_of(32);
  shape.blocks_y = 65536;
  CHECK(!simt::run("kernel", shape, nothing).is_ok());
  shape.blocks_y = 0;
  CHECK(!simt::run("kernel", shape, nothing).is_ok());
}

TEST(buffers_notice_stray_accesses) {
  DeviceBytes bytes(40);
  CHECK(bytes.intact());
  uint8_t* data = static_cast<uint8_t*>(bytes.device());
  for (const int offset : {-1, 40}) {
    const uint8_t old = data[offset];
    data[offset] = 1;
    CHECK(!bytes.intact());
    data[offset] = old;
  }
  CHECK(bytes.intact());
  // A read far past the end ends the process.
  const pid_t child = fork();
  if (child == 0) {
    volatile uint8_t* past = data;
    (void)past[64];
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WIFSIGNALED(status));
}

}  // namespace
