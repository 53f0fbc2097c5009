// Where in a kernel's source a call stands: the last, defaulted argument of everything that can fail.
#pragma once

namespace host {

struct SourceLine {
    const char* file = "";
    int line = 0;

    /// The line of the call, when used as the default value of a parameter.
    static constexpr SourceLine here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

inline bool operator==(SourceLine a, SourceLine b) {
    return a.line == b.line && (a.file == b.file || __builtin_strcmp(a.file, b.file) == 0);
}

inline bool operator!=(SourceLine a, SourceLine b) { return !(a == b); }

} // namespace host
