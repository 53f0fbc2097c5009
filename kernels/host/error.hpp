// What can go wrong, as the driver's numbers, and the sentence that says where and why.
#pragma once

#include <string>

namespace host {

/// CUresult values of the driver API.
enum class Code : int {
    success = 0,
    invalid_value = 1,
    out_of_memory = 2,
    not_initialized = 3,
    invalid_device = 101,
    invalid_image = 200,
    invalid_context = 201,
    invalid_source = 300,
    file_not_found = 301,
    invalid_handle = 400,
    illegal_state = 401,
    not_found = 500,
    not_ready = 600,
    illegal_address = 700,
    launch_out_of_resources = 701,
    assert_failed = 710,
    illegal_instruction = 715,
    misaligned_address = 716,
    invalid_address_space = 717,
    launch_failed = 719,
    not_supported = 801,
    capture_unsupported = 900,
    capture_invalidated = 901,
    capture_merge = 902,
    capture_unmatched = 903,
    capture_unjoined = 904,
    capture_isolation = 905,
    captured_event = 907,
    unknown = 999,
};

/// The result of an operation: success, or a code and a message for a person.
struct [[nodiscard]] Status {
    Code code = Code::success;
    std::string message;

    bool ok() const { return code == Code::success; }
};

inline Status success() { return {}; }

/// A failed status with a printf-style message.
[[gnu::format(printf, 2, 3)]] Status failure(Code code, const char* format, ...);

/// printf into a string.
[[gnu::format(printf, 1, 2)]] std::string text(const char* format, ...);

/// Remembers `status` as this thread's last error if it is one, and returns its number.
int report(const Status& status);

/// Message of this thread's last error; empty before the first.
const char* last_error_message();

/// Message of this thread's last error if it had this code, else nullptr. The text lives for ever.
const char* last_error_message(Code code);

/// The driver's own name and description of a code; nullptr if the code is unknown.
const char* code_name(int code);
const char* code_description(int code);

} // namespace host
