/* All kernels, on whichever panel was included before. */
#include "model.h"
#include "peak.h"

/* Which sources this was built from: library.py refuses a library that was built from others. */
EXPORT uint32_t tandem_source_digest(void) { return TANDEM_SOURCE_DIGEST; }

EXPORT const char *tandem_name(void) { return PANEL_NAME; }

/* Make this process able to run the kernels; 0 if the system does not let it. */
EXPORT int tandem_start(void) { return panel_start(); }
