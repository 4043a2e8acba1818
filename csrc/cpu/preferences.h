// Which algorithm somebody measured to be the fastest for a call (irt_cpu_prefer): corrections of a kernel's model of
// costs.
#pragma once

namespace irt {

constexpr int kLongestAlgorithm = 47;  // bytes of an algorithm's name

// Without preferences, as is usual, a call shall not even make its key.
bool any_preferences();

// Copies the algorithm preferred for `key`; false where there is none.
bool preferred(const char* key, char (&algorithm)[kLongestAlgorithm + 1]);

}  // namespace irt
