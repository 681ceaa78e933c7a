# mark: executes the marker that count.c looks for, an instruction that does nothing and that no compiler chooses, and
# ends. It uses no library, so that it runs in any guest.
        .globl _start
_start:
        nopl 0x7e10c0de(%rax,%rax,1)
        mov $60, %eax
        xor %edi, %edi
        syscall
