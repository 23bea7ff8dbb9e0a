// Work shared out among the calling thread and the pool's helpers.
#pragma once

#include <stdint.h>

// Does the items [first, last) of the work that context describes; runs on any thread.
typedef void work_body(const void *context, int64_t first, int64_t last);

// Has the items [0, size) done, in chunks of about `grain` of them or more: a grain should be some microseconds of
// work. Which thread does which chunk is open, so a body's result must not depend on where chunks begin.
void parallel_for(int64_t size, int64_t grain, work_body *body, const void *context);

// How many threads work at once, the caller included; ignored after the first shared work.
void set_num_threads(int num_threads);
