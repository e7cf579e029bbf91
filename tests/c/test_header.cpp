// The public header is valid C++, needs nothing before it, and links; its initialiser is C++ too.
#include "fastattn.h"

static const fastattn_attention_args initial = FASTATTN_ATTENTION_ARGS_INIT;

int main()
{
    fastattn_attention_args args = FASTATTN_ATTENTION_ARGS_INIT;
    const bool refused = fastattn_attention(&args, nullptr, 0) == FASTATTN_ERROR_SCALE; // none was given
    args.scale = 1;
    const bool empty = fastattn_attention(&args, nullptr, 0) == FASTATTN_OK;
    return refused && empty && initial.window_left == -1 && fastattn_isa_name(FASTATTN_ISA_PORTABLE) ? 0 : 1;
}
