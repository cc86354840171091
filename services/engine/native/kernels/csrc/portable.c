#include "panel_portable.h"
#include "library.h"
