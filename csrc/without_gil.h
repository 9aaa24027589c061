// Python's lock, given up while a kernel works. Every binding that computes uses this guard, and no other.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <thread>

namespace fa {

// Gives Python's lock up, and takes it again at the end of the scope.
//
// A daemon thread may be here while the interpreter ends. Before Python 3.14, PyEval_RestoreThread then ends the thread
// by pthread_exit, which unwinds its stack. Destructors do not let that pass, neither this one nor those of guards
// around it (torch's around a backward pass, say), and the process would abort. So the unwinding stops here and the
// thread sleeps until the process has ended, which is what PyEval_RestoreThread itself does from Python 3.14 on.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // such unwinding may be caught only by a block that never ends
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* const state_;
};

}  // namespace fa
