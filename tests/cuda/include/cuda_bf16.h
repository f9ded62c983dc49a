// Stands in for the toolkit's header when kernels run on the host.
#include "host_cuda.h"
