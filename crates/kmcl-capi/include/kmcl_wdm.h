/* What the KMCL interface needs of the Windows driver headers, and nothing more: types, statuses, MDLs,
 * lists, annotations. Names and layouts are the documented ones; the text is this project's own.
 *
 * C11 and C++17, 64-bit targets. Include it before, or instead of, a project's own shims: annotations
 * that are already defined are left alone. */
#ifndef KMCL_WDM_H
#define KMCL_WDM_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Annotations: for readers and analysers; the compiler sees nothing ------------------------- */

#ifndef _In_
#define _In_
#define _In_opt_
#define _In_range_(low, high)
#define _In_reads_(count)
#define _In_reads_bytes_(bytes)
#define _In_reads_bytes_opt_(bytes)
#define _Out_
#define _Out_opt_
#define _Out_writes_bytes_(bytes)
#define _Out_writes_bytes_to_(bytes, used)
#define _Inout_
#define _Inout_opt_
#define _Must_inspect_result_
#define _Use_decl_annotations_
#define _Ret_maybenull_
#endif
#ifndef _IRQL_requires_max_
#define _IRQL_requires_(irql)
#define _IRQL_requires_max_(irql)
#define _IRQL_requires_min_(irql)
#define _IRQL_requires_same_
#define _IRQL_saves_
#define _IRQL_raises_(irql)
#define _Function_class_(name)
#endif
#ifndef IN
#define IN
#define OUT
#define OPTIONAL
#endif

/* ---- Types ------------------------------------------------------------------------------------- */

#ifndef VOID
#define VOID void
#endif
#define NTAPI
#define FORCEINLINE static inline

typedef void *PVOID;
typedef PVOID HANDLE, *PHANDLE;
typedef char CHAR, *PCHAR;
typedef unsigned char UCHAR, *PUCHAR;
typedef UCHAR BOOLEAN, *PBOOLEAN;
typedef int16_t SHORT, CSHORT;
typedef uint16_t USHORT, *PUSHORT;
typedef int32_t LONG, *PLONG;
typedef uint32_t ULONG, *PULONG; /* 32 bits, as on Windows */
typedef int64_t LONGLONG, LONG64;
typedef uint64_t ULONGLONG, ULONG64;
typedef int32_t INT32;
typedef uint8_t UINT8, *PUINT8;
typedef uint16_t UINT16, *PUINT16;
typedef uint32_t UINT32, *PUINT32;
typedef uint64_t UINT64, *PUINT64;
typedef size_t SIZE_T;
typedef uintptr_t ULONG_PTR;
typedef uint64_t PFN_NUMBER, *PPFN_NUMBER;

/* 16 bits, whatever the compiler takes for wchar_t: text is written u"so", or with -fshort-wchar. */
#ifdef __cplusplus
typedef char16_t WCHAR;
#else
typedef uint16_t WCHAR;
#endif
typedef WCHAR *PWCH, *PWSTR;

#ifndef TRUE
#define TRUE 1
#define FALSE 0
#endif

/* The members of a structure that has no name of its own, in C and in C++ alike. */
#define KMCL_UNNAMED __extension__

typedef union _LARGE_INTEGER {
    KMCL_UNNAMED struct {
        ULONG LowPart;
        LONG HighPart;
    };
    LONGLONG QuadPart;
} LARGE_INTEGER, *PLARGE_INTEGER;

typedef struct _GUID {
    uint32_t Data1;
    uint16_t Data2;
    uint16_t Data3;
    uint8_t Data4[8];
} GUID, *LPGUID;
typedef const GUID *LPCGUID;

/* Length and MaximumLength are bytes; Buffer need not end in a zero. */
typedef struct _UNICODE_STRING {
    USHORT Length;
    USHORT MaximumLength;
    PWCH Buffer;
} UNICODE_STRING, *PUNICODE_STRING;
typedef const UNICODE_STRING *PCUNICODE_STRING;

#define RTL_CONSTANT_STRING(text) \
    { (USHORT)(sizeof(text) - sizeof((text)[0])), (USHORT)sizeof(text), (PWCH)(text) }

/* Where a channel belongs to: made by KmclDeviceCreate. */
typedef struct _DEVICE_OBJECT *PDEVICE_OBJECT;

typedef VOID (*PINTERFACE_REFERENCE)(PVOID Context);
typedef VOID (*PINTERFACE_DEREFERENCE)(PVOID Context);

/* The head of every table of functions. */
typedef struct _INTERFACE {
    USHORT Size;
    USHORT Version;
    PVOID Context;
    PINTERFACE_REFERENCE InterfaceReference;
    PINTERFACE_DEREFERENCE InterfaceDereference;
} INTERFACE, *PINTERFACE;

#define UNREFERENCED_PARAMETER(name) ((void)(name))
#define CONTAINING_RECORD(address, type, field) \
    ((type *)(void *)((unsigned char *)(address) - offsetof(type, field)))
#define FIELD_OFFSET(type, field) ((LONG)offsetof(type, field))
#define RtlZeroMemory(to, bytes) ((void)memset((to), 0, (bytes)))
#define RtlCopyMemory(to, from, bytes) ((void)memcpy((to), (from), (bytes)))

/* ---- Statuses ---------------------------------------------------------------------------------- */

typedef LONG NTSTATUS, *PNTSTATUS;

#define NT_SUCCESS(status) ((NTSTATUS)(status) >= 0)

/* The library's own list: made from the Rust one, and held to it by a test. */
/* BEGIN GENERATED STATUSES */
#define STATUS_SUCCESS ((NTSTATUS)0x00000000u)
#define STATUS_PENDING ((NTSTATUS)0x00000103u)
#define STATUS_BUFFER_OVERFLOW ((NTSTATUS)0x80000005u)
#define STATUS_DEVICE_BUSY ((NTSTATUS)0x80000011u)
#define STATUS_UNSUCCESSFUL ((NTSTATUS)0xC0000001u)
#define STATUS_NOT_IMPLEMENTED ((NTSTATUS)0xC0000002u)
#define STATUS_INVALID_HANDLE ((NTSTATUS)0xC0000008u)
#define STATUS_INVALID_PARAMETER ((NTSTATUS)0xC000000Du)
#define STATUS_INVALID_DEVICE_REQUEST ((NTSTATUS)0xC0000010u)
#define STATUS_MORE_PROCESSING_REQUIRED ((NTSTATUS)0xC0000016u)
#define STATUS_ALREADY_COMMITTED ((NTSTATUS)0xC0000021u)
#define STATUS_ACCESS_DENIED ((NTSTATUS)0xC0000022u)
#define STATUS_BUFFER_TOO_SMALL ((NTSTATUS)0xC0000023u)
#define STATUS_OBJECT_NAME_COLLISION ((NTSTATUS)0xC0000035u)
#define STATUS_REVISION_MISMATCH ((NTSTATUS)0xC0000059u)
#define STATUS_INSUFFICIENT_RESOURCES ((NTSTATUS)0xC000009Au)
#define STATUS_DEVICE_NOT_READY ((NTSTATUS)0xC00000A3u)
#define STATUS_IO_TIMEOUT ((NTSTATUS)0xC00000B5u)
#define STATUS_NOT_SUPPORTED ((NTSTATUS)0xC00000BBu)
#define STATUS_INVALID_PARAMETER_1 ((NTSTATUS)0xC00000EFu)
#define STATUS_INVALID_PARAMETER_2 ((NTSTATUS)0xC00000F0u)
#define STATUS_INVALID_PARAMETER_3 ((NTSTATUS)0xC00000F1u)
#define STATUS_INVALID_PARAMETER_4 ((NTSTATUS)0xC00000F2u)
#define STATUS_INVALID_PARAMETER_5 ((NTSTATUS)0xC00000F3u)
#define STATUS_INVALID_PARAMETER_6 ((NTSTATUS)0xC00000F4u)
#define STATUS_INVALID_PARAMETER_7 ((NTSTATUS)0xC00000F5u)
#define STATUS_INVALID_PARAMETER_8 ((NTSTATUS)0xC00000F6u)
#define STATUS_INVALID_PARAMETER_9 ((NTSTATUS)0xC00000F7u)
#define STATUS_INVALID_PARAMETER_10 ((NTSTATUS)0xC00000F8u)
#define STATUS_INVALID_PARAMETER_11 ((NTSTATUS)0xC00000F9u)
#define STATUS_INVALID_PARAMETER_12 ((NTSTATUS)0xC00000FAu)
#define STATUS_CANCELLED ((NTSTATUS)0xC0000120u)
#define STATUS_INVALID_DEVICE_STATE ((NTSTATUS)0xC0000184u)
#define STATUS_IO_DEVICE_ERROR ((NTSTATUS)0xC0000185u)
#define STATUS_INVALID_BUFFER_SIZE ((NTSTATUS)0xC0000206u)
#define STATUS_NOT_FOUND ((NTSTATUS)0xC0000225u)
#define STATUS_CONNECTION_REFUSED ((NTSTATUS)0xC0000236u)
#define STATUS_DEVICE_REMOVED ((NTSTATUS)0xC00002B6u)
/* END GENERATED STATUSES */

/* ---- Interrupt request levels ------------------------------------------------------------------ */

typedef UCHAR KIRQL, *PKIRQL;

#define PASSIVE_LEVEL ((KIRQL)0)  /* may sleep */
#define APC_LEVEL ((KIRQL)1)      /* never seen here */
#define DISPATCH_LEVEL ((KIRQL)2) /* must not sleep */

/* PAGED_CODE and its relatives mark code for the linker; there is nothing to mark here. */
#define PAGED_CODE() ((void)0)

KIRQL KmclCurrentIrql(void);
/* The level of the callback that this thread is in; PASSIVE_LEVEL outside of callbacks. */
#define KeGetCurrentIrql() KmclCurrentIrql()

/* ---- Memory descriptor lists ------------------------------------------------------------------- */

#define PAGE_SHIFT 12
#ifndef PAGE_SIZE
#define PAGE_SIZE 4096u
#endif
#define BYTE_OFFSET(address) ((ULONG)((ULONG_PTR)(address) & (PAGE_SIZE - 1u)))
#define PAGE_ALIGN(address) ((PVOID)((ULONG_PTR)(address) & ~(ULONG_PTR)(PAGE_SIZE - 1u)))
#define ADDRESS_AND_SIZE_TO_SPAN_PAGES(address, bytes) \
    ((ULONG)(((ULONG_PTR)BYTE_OFFSET(address) + (ULONG_PTR)(bytes) + (PAGE_SIZE - 1u)) >> PAGE_SHIFT))

/* Pages of guest memory. The page frame numbers follow the structure. Fields are read with the
 * accessors below; Process belongs to the library. */
typedef struct _MDL {
    struct _MDL *Next;
    CSHORT Size;
    CSHORT MdlFlags;
    PVOID Process;
    PVOID MappedSystemVa;
    PVOID StartVa;
    ULONG ByteCount;
    ULONG ByteOffset;
} MDL, *PMDL;

#define MDL_MAPPED_TO_SYSTEM_VA 0x0001
#define MDL_PAGES_LOCKED 0x0002
#define MDL_SOURCE_IS_NONPAGED_POOL 0x0004

typedef enum _MM_PAGE_PRIORITY {
    LowPagePriority = 0,
    NormalPagePriority = 16,
    HighPagePriority = 32
} MM_PAGE_PRIORITY;
#define MdlMappingNoExecute 0x40000000u

typedef enum _LOCK_OPERATION { IoReadAccess, IoWriteAccess, IoModifyAccess } LOCK_OPERATION;
typedef CHAR KPROCESSOR_MODE;
#define KernelMode ((KPROCESSOR_MODE)0)
#define UserMode ((KPROCESSOR_MODE)1)

#define MmGetMdlByteCount(mdl) ((mdl)->ByteCount)
#define MmGetMdlByteOffset(mdl) ((mdl)->ByteOffset)
#define MmGetMdlPfnArray(mdl) ((PPFN_NUMBER)(void *)((mdl) + 1))
#define MmGetMdlVirtualAddress(mdl) ((PVOID)((PUCHAR)(mdl)->StartVa + (mdl)->ByteOffset))
#define MmSizeOfMdl(address, bytes) \
    (sizeof(MDL) + sizeof(PFN_NUMBER) * (SIZE_T)ADDRESS_AND_SIZE_TO_SPAN_PAGES((address), (bytes)))

/* An address for the bytes of the first MDL of a chain, valid until MmUnmapLockedPages or the end of
 * the packet or GPADL that it came with; NULL where there is none. */
PVOID KmclMdlMap(_In_ PMDL Mdl);
VOID KmclMdlUnmap(_In_ PMDL Mdl);
/* Looks up the pages behind an MDL that IoAllocateMdl has made: they must be pages that
 * KmclChannelAllocatePages gave out. */
NTSTATUS KmclMdlLock(_In_ PMDL Mdl);

FORCEINLINE VOID MmInitializeMdl(PMDL Mdl, PVOID Address, SIZE_T Bytes)
{
    memset(Mdl, 0, sizeof(MDL));
    Mdl->Size = (CSHORT)MmSizeOfMdl(Address, Bytes);
    Mdl->StartVa = PAGE_ALIGN(Address);
    Mdl->ByteOffset = BYTE_OFFSET(Address);
    Mdl->ByteCount = (ULONG)Bytes;
}

/* The last three arguments of the documented function concern I/O requests, which are not here. */
FORCEINLINE PMDL IoAllocateMdl(PVOID Address, ULONG Bytes, BOOLEAN Secondary, BOOLEAN Charge, PVOID Irp)
{
    PMDL Mdl = (PMDL)malloc(MmSizeOfMdl(Address, Bytes));
    (void)Secondary;
    (void)Charge;
    (void)Irp;
    if (Mdl != NULL) {
        MmInitializeMdl(Mdl, Address, Bytes);
    }
    return Mdl;
}

FORCEINLINE VOID IoFreeMdl(PMDL Mdl)
{
    free(Mdl);
}

/* Windows raises an exception where the pages are not there; here MDL_PAGES_LOCKED stays clear, and
 * every function that takes the MDL refuses it. */
FORCEINLINE VOID MmProbeAndLockPages(PMDL Mdl, KPROCESSOR_MODE Mode, LOCK_OPERATION Operation)
{
    (void)Mode;
    (void)Operation;
    (void)KmclMdlLock(Mdl);
}

FORCEINLINE VOID MmBuildMdlForNonPagedPool(PMDL Mdl)
{
    if (NT_SUCCESS(KmclMdlLock(Mdl))) {
        Mdl->MappedSystemVa = MmGetMdlVirtualAddress(Mdl);
        Mdl->MdlFlags = (CSHORT)(Mdl->MdlFlags | MDL_SOURCE_IS_NONPAGED_POOL);
    }
}

FORCEINLINE VOID MmUnlockPages(PMDL Mdl)
{
    Mdl->MdlFlags = (CSHORT)(Mdl->MdlFlags & ~MDL_PAGES_LOCKED);
}

FORCEINLINE PVOID MmGetSystemAddressForMdlSafe(PMDL Mdl, ULONG Priority)
{
    (void)Priority;
    if (Mdl->MdlFlags & (MDL_MAPPED_TO_SYSTEM_VA | MDL_SOURCE_IS_NONPAGED_POOL)) {
        return Mdl->MappedSystemVa;
    }
    return KmclMdlMap(Mdl);
}

FORCEINLINE VOID MmUnmapLockedPages(PVOID Address, PMDL Mdl)
{
    (void)Address;
    KmclMdlUnmap(Mdl);
}

/* ---- Doubly linked lists ----------------------------------------------------------------------- */

typedef struct _LIST_ENTRY {
    struct _LIST_ENTRY *Flink;
    struct _LIST_ENTRY *Blink;
} LIST_ENTRY, *PLIST_ENTRY;

FORCEINLINE VOID InitializeListHead(PLIST_ENTRY Head)
{
    Head->Flink = Head->Blink = Head;
}

FORCEINLINE BOOLEAN IsListEmpty(const LIST_ENTRY *Head)
{
    return Head->Flink == Head ? TRUE : FALSE;
}

FORCEINLINE BOOLEAN RemoveEntryList(PLIST_ENTRY Entry)
{
    PLIST_ENTRY Next = Entry->Flink;
    PLIST_ENTRY Before = Entry->Blink;
    Before->Flink = Next;
    Next->Blink = Before;
    return Next == Before ? TRUE : FALSE;
}

FORCEINLINE PLIST_ENTRY RemoveHeadList(PLIST_ENTRY Head)
{
    PLIST_ENTRY Entry = Head->Flink;
    (void)RemoveEntryList(Entry);
    return Entry;
}

FORCEINLINE PLIST_ENTRY RemoveTailList(PLIST_ENTRY Head)
{
    PLIST_ENTRY Entry = Head->Blink;
    (void)RemoveEntryList(Entry);
    return Entry;
}

FORCEINLINE VOID InsertTailList(PLIST_ENTRY Head, PLIST_ENTRY Entry)
{
    PLIST_ENTRY Last = Head->Blink;
    Entry->Flink = Head;
    Entry->Blink = Last;
    Last->Flink = Entry;
    Head->Blink = Entry;
}

FORCEINLINE VOID InsertHeadList(PLIST_ENTRY Head, PLIST_ENTRY Entry)
{
    PLIST_ENTRY First = Head->Flink;
    Entry->Flink = First;
    Entry->Blink = Head;
    First->Blink = Entry;
    Head->Flink = Entry;
}

#ifdef __cplusplus
}
#endif
#endif /* KMCL_WDM_H */
