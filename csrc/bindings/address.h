// Converts addresses, which Python passes as integers, to pointers.
#pragma once
#include <cstdint>

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
