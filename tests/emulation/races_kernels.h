#pragma once

#include <string>
#include <vector>

namespace ffcl {

std::vector<std::string> race_names();
void run_race(const std::string& name, bool mended);  // throws where a race is found

}  // namespace ffcl
