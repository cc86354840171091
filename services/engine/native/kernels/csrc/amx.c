#include "panel_amx.h"
#include "library.h"
