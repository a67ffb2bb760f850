// A parallel loop over an index range; libgomp is the one torch has loaded, so torch.set_num_threads governs it.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#ifdef __SANITIZE_THREAD__
#include <thread>
#include <vector>
#endif

namespace tk {

#ifdef __SANITIZE_THREAD__
// Threads whose start and end ThreadSanitizer sees; it takes libgomp's barriers for none.
template <class F>
void run_in_threads(int64_t n, F&& f) {
  const int64_t part = 4, size = (n + part - 1) / part;
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < n; begin += size)
    threads.emplace_back([&f, n, begin, size] { f(begin, std::min(n, begin + size)); });
  for (std::thread& thread : threads) thread.join();
}
#endif

// Calls f and keeps the first exception: one that leaves a parallel region would end the process.
template <class F>
void caught(std::exception_ptr& first, F&& f) {
  try {
    f();
  } catch (...) {
#pragma omp critical(tk_caught)
    if (!first) first = std::current_exception();
  }
}

// Calls f(begin, end) on disjoint ranges that cover [0, n), each of about `grain` indices or more; serially where n is
// not above the grain. How the range is cut depends on the number of threads: f's results must not depend on the cuts.
template <class F>
void parallel_for(int64_t n, int64_t grain, F&& f) {
  if (n <= 0) return;
#ifdef __SANITIZE_THREAD__
  if (n > grain) return run_in_threads(n, f);
#endif
  const int64_t parts = std::min<int64_t>(omp_get_max_threads(), (n + grain - 1) / std::max<int64_t>(grain, 1));
  if (parts <= 1 || omp_in_parallel()) {
    f(int64_t{0}, n);
    return;
  }
  std::exception_ptr thrown;
// always the full team: libgomp ends threads when a region asks for fewer, and starting them again is slow
#pragma omp parallel
  {
    const int64_t part = std::max<int64_t>(1, std::min<int64_t>(parts, omp_get_num_threads()));
    const int64_t me = omp_get_thread_num(), size = (n + part - 1) / part;
    const int64_t begin = me * size, end = std::min(n, begin + size);
    if (begin < end) caught(thrown, [&] { f(begin, end); });
  }
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace tk
