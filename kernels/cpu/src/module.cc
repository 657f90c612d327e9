// The Python module. What an op means is said in level.h; ops.cc, session.cc and limits.cc bind the
// work.
#include <nanobind/nanobind.h>

#include "dispatch.h"

namespace nb = nanobind;

namespace samp {
void bind_ops(nb::module_& m);
void bind_session(nb::module_& m);
}  // namespace samp
void bind_limits(nb::module_& m);

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // A backend may live as long as the interpreter.
  samp::bind_ops(m);
  samp::bind_session(m);
  bind_limits(m);

  // name -> "runs", "not on this CPU" or "not built", best first.
  m.def("levels", [] {
    nb::dict found;
    for (int i = 0; i < samp::kLevels; ++i)
      found[samp::kLevelNames[i]] = samp::runnable_level(i) ? "runs"
                                    : samp::built_level(i)  ? "not on this CPU"
                                                            : "not built";
    return found;
  });
}
