// Threads for the CPU kernels: the OpenMP runtime that the process already has, whichever that is.
//
// torch brings its own libgomp (or libiomp). A module that linked one at build time could map a second, and
// two pools of spinning threads would then fight over the cores. So nothing is linked: the runtime in the
// process is asked for at the first call, and only where there is none is the system's libgomp opened.
#pragma once

#include <cstdint>

namespace lct {

// Runs body(context, task, slot) once for every task in [0, tasks) on at most `threads` threads, this one
// included, and returns when all are done. Tasks are claimed in rising order; which thread runs which is not
// fixed. slot is in [0, threads) and differs between bodies that run at the same time: the index of a scratch
// buffer. body must not throw. Inside a parallel region of the caller it runs on that thread alone.
void parallel_for(int threads, int64_t tasks, void (*body)(void* context, int64_t task, int slot),
                  void* context);

template <class Body>
void parallel_for(int threads, int64_t tasks, Body&& body) {
  parallel_for(
      threads, tasks,
      [](void* context, int64_t task, int slot) noexcept { (*static_cast<Body*>(context))(task, slot); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace lct
