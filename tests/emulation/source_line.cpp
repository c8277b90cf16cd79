#include "source_line.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>

namespace emulated {

std::string source_line(const void* address) {
  Dl_info module;
  if (!dladdr(address, &module)) return "unknown";
  char command[4096], line[4096];
  const auto offset = static_cast<const char*>(address) - static_cast<const char*>(module.dli_fbase);
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx 2>/dev/null", module.dli_fname,
                static_cast<size_t>(offset - 1));
  std::string lines;
  if (FILE* output = popen(command, "r")) {
    while (std::fgets(line, sizeof line, output)) {
      std::string text(line);
      text.erase(std::min(text.find_first_of(" \n"), text.size()));
      text.erase(0, text.rfind('/') + 1);
      if (text.find(".cu") != std::string::npos) lines += (lines.empty() ? "" : " in ") + text;
    }
    pclose(output);
  }
  return lines.empty() ? "unknown" : lines;
}

}  // namespace emulated
