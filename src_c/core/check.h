/* Every check of the C interface: what it lets pass cannot lead outside of the caller's memory. */
#ifndef FA_CHECK_H
#define FA_CHECK_H

#include "fastattn.h"

enum { FA_MOST_DIM = 1 << 20 }; /* the largest head_dim and v_head_dim */

fastattn_status fastattn_check_args(const fastattn_attention_args *args);

#endif
