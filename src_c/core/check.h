/* Every check of the C interface: what it lets pass cannot lead outside of the caller's memory. */
#ifndef FA_CHECK_H
#define FA_CHECK_H

#include "fastattn.h"

fastattn_status fastattn_check_args(const fastattn_attention_args *args);

#endif
