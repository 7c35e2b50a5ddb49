// How many threads are worth starting.
#pragma once

namespace teamlora {

// Processor cores that this process may use; two threads of one core count once.
int usable_cores();

}  // namespace teamlora
