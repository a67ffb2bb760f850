// The scheduler behind cuda_runtime.h: blocks one after the other, each thread of a block a fiber that runs until its
// next collective. The order of the fibers is a setting: a missing barrier shows as a result that depends on it.
#include "cuda_host.h"

#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

constexpr size_t kLargest = 48 * 1024, kArena = kLargest + 4096, kStack = 1 << 16;
constexpr unsigned char kPoison = 0xff;  // a NaN in every float type
alignas(16) unsigned char tk_shared_memory[kArena];
dim3 gridDim, blockDim, blockIdx;

namespace cuda_host {

Thread* current;

namespace {

struct Fiber : Thread {
  int warp = 0;
  bool started = false, finished = false;
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t entry;
  std::jmp_buf resume;
};

Order order = Order::forward;
std::mt19937 generator;
std::vector<std::unique_ptr<Fiber>> fibers;
std::jmp_buf scheduler;
const std::function<void()>* body;

void main_of_fiber() {
  (*body)();
  static_cast<Fiber*>(current)->finished = true;
  _longjmp(scheduler, 1);
}

// setcontext enters a fiber once; the switches after that are _longjmp, which makes no system call
void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.entry);
}

void prepare(Fiber& fiber, unsigned thread) {
  fiber.index = dim3(thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y));
  fiber.lane = int(thread % 32), fiber.warp = int(thread / 32);
  fiber.started = fiber.finished = false;
  fiber.request = Request();
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = fiber.stack.get();
  fiber.entry.uc_stack.ss_size = kStack;
  fiber.entry.uc_link = nullptr;
  makecontext(&fiber.entry, main_of_fiber, 0);
}

std::string describe(const Fiber& fiber) {
  static const char* const names[] = {"nothing", "a shuffle", "a vote", "__syncwarp", "__syncthreads"};
  const Request& request = fiber.request;
  char text[256];
  if (fiber.finished)
    std::snprintf(text, sizeof text, "thread %d has returned", fiber.warp * 32 + fiber.lane);
  else
    std::snprintf(text, sizeof text, "thread %d waits in %s at %s:%d for lanes 0x%08x", fiber.warp * 32 + fiber.lane,
                  names[int(request.kind)], request.file, request.line, request.mask);
  return text;
}

[[noreturn]] void fail(const std::string& what, const Fiber& one, const Fiber& other) {
  throw std::runtime_error(what + " in block " + std::to_string(blockIdx.x) + ": " + describe(one) + "; " +
                           describe(other));
}

bool same_site(const Request& a, const Request& b) {
  return a.kind == b.kind && a.mask == b.mask && a.size == b.size && a.line == b.line && !std::strcmp(a.file, b.file);
}

// The threads that take part in the fiber's collective.
std::vector<Fiber*> partners(Fiber& fiber, size_t threads) {
  std::vector<Fiber*> found;
  const bool all = fiber.request.kind == Kind::syncthreads;
  for (size_t i = all ? 0 : fiber.warp * 32; i < (all ? threads : fiber.warp * 32 + 32); ++i) {
    if (!all && !(fiber.request.mask >> (i % 32) & 1)) continue;
    if (i >= threads) throw std::runtime_error("a mask names a lane that does not exist: " + describe(fiber));
    found.push_back(fibers[i].get());
  }
  return found;
}

void answer(Fiber& fiber, const std::vector<Fiber*>& group) {
  Request& request = fiber.request;
  if (request.kind == Kind::ballot) {
    unsigned votes = 0;
    for (const Fiber* f : group) votes |= unsigned(f->request.flag) << f->lane;
    std::memcpy(request.result, &votes, sizeof votes);
  } else if (request.kind == Kind::shuffle) {
    if (!(request.mask >> request.source & 1)) fail("a shuffle reads a lane outside its mask", fiber, fiber);
    std::memcpy(request.result, fibers[fiber.warp * 32 + request.source]->request.value, request.size);
  }
}

// Lets the fiber's collective happen if everybody has arrived.
bool resolve(Fiber& fiber, size_t threads) {
  if (fiber.request.kind != Kind::syncthreads && !(fiber.request.mask >> fiber.lane & 1))
    fail("a thread is not in its own mask", fiber, fiber);
  const std::vector<Fiber*> group = partners(fiber, threads);
  for (Fiber* f : group) {
    if (f->finished) fail("a thread can never arrive", fiber, *f);
    if (!same_site(f->request, fiber.request)) return false;
  }
  for (Fiber* f : group) answer(*f, group);
  for (Fiber* f : group) f->request.kind = Kind::none;
  return true;
}

// Runs each thread of a warp to its next collective, again and again while that leads anywhere, `rounds` times at most.
bool run_warp(size_t warp, size_t threads, int rounds) {
  const size_t first = 32 * warp, last = std::min(threads, first + 32);
  std::vector<size_t> turn(last - first);
  std::iota(turn.begin(), turn.end(), first);
  if (order == Order::backward) std::reverse(turn.begin(), turn.end());
  if (order == Order::random) std::shuffle(turn.begin(), turn.end(), generator);
  bool any = false;
  for (bool progress = true; progress && rounds > 0; --rounds) {
    progress = false;
    for (size_t i : turn) {
      Fiber& fiber = *fibers[i];
      if (fiber.finished) continue;
      if (fiber.request.kind == Kind::none) resume(fiber), progress = true;
      if (!fiber.finished && resolve(fiber, threads)) progress = true;
    }
    any |= progress;
  }
  return any;
}

// A warp runs as far ahead of the others as it can, except in random order.
void run_block(size_t threads) {
  std::vector<size_t> turn((threads + 31) / 32);
  std::iota(turn.begin(), turn.end(), size_t{0});
  if (order == Order::backward) std::reverse(turn.begin(), turn.end());
  for (size_t i = 0; i < threads; ++i) prepare(*fibers[i], unsigned(i));
  for (bool progress = true; progress;) {
    progress = false;
    if (order == Order::random) std::shuffle(turn.begin(), turn.end(), generator);
    for (size_t warp : turn) {
      const int rounds = order == Order::random ? 1 + int(generator() % 8) : std::numeric_limits<int>::max();
      progress |= run_warp(warp, threads, rounds);
    }
  }
  std::vector<Fiber*> stuck;
  for (size_t i = 0; i < threads; ++i)
    if (!fibers[i]->finished) stuck.push_back(fibers[i].get());
  for (Fiber* f : stuck)
    if (!same_site(f->request, stuck[0]->request)) fail("deadlock", *stuck[0], *f);
  if (!stuck.empty()) fail("deadlock", *stuck[0], *stuck.back());
}

}  // namespace

void set_order(Order value, unsigned seed) { order = value, generator.seed(seed); }

void wait() {
  if (!_setjmp(static_cast<Fiber*>(current)->resume)) _longjmp(scheduler, 1);
}

void run(dim3 grid_size, dim3 block_size, size_t shared_bytes, const std::function<void()>& kernel) {
  const size_t threads = size_t{block_size.x} * block_size.y * block_size.z;
  if (threads == 0 || threads > 1024 || grid_size.x == 0 || shared_bytes > kLargest)
    throw std::runtime_error("a launch that the device would refuse");
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  gridDim = grid_size, blockDim = block_size, body = &kernel;
  for (size_t b = 0; b < size_t{gridDim.x} * gridDim.y * gridDim.z; ++b) {
    blockIdx = dim3(unsigned(b % gridDim.x), unsigned(b / gridDim.x % gridDim.y), unsigned(b / gridDim.x / gridDim.y));
    std::memset(tk_shared_memory, kPoison, sizeof tk_shared_memory);
    run_block(threads);
    for (size_t i = shared_bytes; i < kArena; ++i)
      if (tk_shared_memory[i] != kPoison)
        throw std::runtime_error("byte " + std::to_string(i) + " of shared memory is written, beyond the launch's " +
                                 std::to_string(shared_bytes));
  }
}

}  // namespace cuda_host
