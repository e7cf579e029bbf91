// The public header is valid C++, needs nothing before it, and links.
#include "fastattn.h"

int main()
{
    return fastattn_isa_available(FASTATTN_ISA_PORTABLE) ? 0 : 1;
}
