#pragma once

#include <exception>
#include <new>

#include "../fastclip.h"

namespace fastclip {

template <class Work>
int guarded(const Work& work) {  // turns exceptions into a status, because none may cross the C interface
  try {
    work();
  } catch (const std::bad_alloc&) {
    return FASTCLIP_OUT_OF_MEMORY;
  } catch (const std::exception&) {
    return FASTCLIP_FAILED;
  }
  return FASTCLIP_OK;
}

}  // namespace fastclip
