// Reading one type's bits as another's.
#pragma once

#include <cstring>
#include <type_traits>

namespace host {

template <class To, class From> inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable_v<From>);
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

} // namespace host
