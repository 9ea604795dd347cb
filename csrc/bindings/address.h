// What the bindings share: Python hands over addresses as numbers.
#pragma once
#include <cstdint>

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
