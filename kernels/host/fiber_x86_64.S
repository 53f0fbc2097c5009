// Fiber switch, x86-64 System V: the callee-saved registers live on the stack that is left behind.

#if defined(__x86_64__) && !defined(HOST_UCONTEXT)

    .text

// void host_fiber_switch(void** save /* rdi */, void* target /* rsi */)
    .globl host_fiber_switch
    .hidden host_fiber_switch
    .type host_fiber_switch, @function
    .p2align 4
host_fiber_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size host_fiber_switch, . - host_fiber_switch

// void* host_fiber_prepare(void* bottom /* rdi */, void* top /* rsi */, entry /* rdx */, argument /* rcx */)
// Builds the frame that host_fiber_switch pops: r15 and r14 carry the argument and the entry to `begin`.
    .globl host_fiber_prepare
    .hidden host_fiber_prepare
    .type host_fiber_prepare, @function
    .p2align 4
host_fiber_prepare:
    movq %rsi, %rax
    andq $-16, %rax
    subq $64, %rax
    leaq begin(%rip), %r8
    movq %rcx, 0(%rax)
    movq %rdx, 8(%rax)
    movq $0, 16(%rax)
    movq $0, 24(%rax)
    movq $0, 32(%rax)
    movq $0, 40(%rax)
    movq %r8, 48(%rax)
    movq $0, 56(%rax)
    ret
    .size host_fiber_prepare, . - host_fiber_prepare

    .type begin, @function
begin:
    .cfi_startproc
    .cfi_undefined rip
    andq $-16, %rsp
    movq %r15, %rdi
    callq *%r14
    ud2
    .cfi_endproc
    .size begin, . - begin

#endif

    .section .note.GNU-stack, "", @progbits
