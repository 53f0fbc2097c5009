// Runs the tests whose names contain one of the arguments; all of them without arguments.
//
//   host_tests [NAME ...]
//   host_tests --launch KERNEL    runs one kernel of broken.cu, for a sanitizer to judge

#include "harness.hpp"

int launch_bug(const char* kernel); // bugs_test.cpp

int main(int count, char** arguments) {
    if (count == 3 && std::string(arguments[1]) == "--launch") return launch_bug(arguments[2]);
    int run = 0, failed = 0;
    for (const harness::Test& test : harness::tests()) {
        bool wanted = count == 1;
        for (int i = 1; i < count; ++i) wanted |= strstr(test.name, arguments[i]) != nullptr;
        if (!wanted) continue;
        const int before = harness::failures();
        test.run();
        ++run;
        if (harness::failures() == before) continue;
        ++failed;
        printf("FAILED %s\n", test.name);
    }
    printf("%d tests, %d failed\n", run, failed);
    return failed == 0 && run > 0 ? 0 : 1;
}
