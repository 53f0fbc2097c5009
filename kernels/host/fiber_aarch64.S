// Fiber switch, AArch64: the callee-saved registers live on the stack that is left behind.

#if defined(__aarch64__) && !defined(HOST_UCONTEXT)

    .text

// void host_fiber_switch(void** save /* x0 */, void* target /* x1 */)
    .globl host_fiber_switch
    .hidden host_fiber_switch
    .type host_fiber_switch, %function
    .p2align 4
host_fiber_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size host_fiber_switch, . - host_fiber_switch

// void* host_fiber_prepare(void* bottom /* x0 */, void* top /* x1 */, entry /* x2 */, argument /* x3 */)
// Builds the frame that host_fiber_switch pops: x19 and x20 carry the argument and the entry to `begin`.
    .globl host_fiber_prepare
    .hidden host_fiber_prepare
    .type host_fiber_prepare, %function
    .p2align 4
host_fiber_prepare:
    and x0, x1, #-16
    sub x0, x0, #160
    stp x3, x2, [x0, #0]
    adr x9, begin
    stp xzr, x9, [x0, #80]
    ret
    .size host_fiber_prepare, . - host_fiber_prepare

    .type begin, %function
begin:
    .cfi_startproc
    .cfi_undefined x30
    mov x0, x19
    blr x20
    brk #0
    .cfi_endproc
    .size begin, . - begin

#endif

    .section .note.GNU-stack, "", %progbits
