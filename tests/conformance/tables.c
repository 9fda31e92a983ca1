/* Getting the function tables: section 2. */
#include "check.h"

int main(void)
{
    KMCL_CLIENT_INTERFACE_V1 table;
    KMCL_SERVER_INTERFACE_V1 both;
    INTERFACE *head = (PINTERFACE)(void *)&table;
    GUID unknown = {1, 2, 3, {4}};
    UINT32 before;

    begin();
    before = KmclInterfaceReferences();
    memset(&table, 0, sizeof table);
    ROW(KmclQueryInterface, "unknown-type", KmclQueryInterface(&unknown, sizeof table, 1, head) == STATUS_NOT_SUPPORTED);
    ROW(KmclQueryInterface, "D-65-version", KmclQueryInterface(&KMCL_CLIENT_INTERFACE_TYPE, sizeof table, 2, head) == STATUS_NOT_SUPPORTED);
    ROW(KmclQueryInterface, "size-smaller", KmclQueryInterface(&KMCL_CLIENT_INTERFACE_TYPE, sizeof table - 8, 1, head) == STATUS_INVALID_BUFFER_SIZE);
    ROW(KmclQueryInterface, "size-larger", KmclQueryInterface(&KMCL_CLIENT_INTERFACE_TYPE, sizeof both, 1, head) == STATUS_INVALID_BUFFER_SIZE);
    ROW(KmclQueryInterface, "size-0", KmclQueryInterface(&KMCL_CLIENT_INTERFACE_TYPE, 0, 1, head) == STATUS_INVALID_BUFFER_SIZE);
    ROW(KmclQueryInterface, "null-table", KmclQueryInterface(&KMCL_CLIENT_INTERFACE_TYPE, sizeof table, 1, NULL) == STATUS_INVALID_PARAMETER_4);
    ROW(KmclQueryInterface, "null-type", KmclQueryInterface(NULL, sizeof table, 1, head) == STATUS_INVALID_PARAMETER_1);
    ROW(KmclQueryInterface, "untouched-on-failure", table.Size == 0 && table.VmbChannelAllocate == NULL);
    ROW(KmclQueryInterface, "no-reference-on-failure", KmclInterfaceReferences() == before);

    ROW(KmclQueryInterface, "client", KmclQueryInterface(&KMCL_CLIENT_INTERFACE_TYPE, sizeof table, KMCL_CLIENT_INTERFACE_VERSION_LATEST, head) == STATUS_SUCCESS);
    ROW(KmclQueryInterface, "head", table.Size == sizeof table && table.Version == KMCL_CLIENT_INTERFACE_VERSION_V1);
    ROW(KmclQueryInterface, "reference", KmclInterfaceReferences() == before + 1);
    table.InterfaceReference(table.Context);
    ROW(InterfaceReference, "count", KmclInterfaceReferences() == before + 2);
    table.InterfaceDereference(table.Context);
    table.InterfaceDereference(table.Context);
    ROW(InterfaceDereference, "count", KmclInterfaceReferences() == before);

    ROW(KmclQueryInterface, "server", KmclQueryInterface(&KMCL_SERVER_INTERFACE_TYPE, sizeof both, KMCL_SERVER_INTERFACE_VERSION_V1, (PINTERFACE)(void *)&both) == STATUS_SUCCESS);
    ROW(KmclQueryInterface, "prefix", memcmp(&both.VmbChannelAllocate, &table.VmbChannelAllocate, sizeof table - sizeof(INTERFACE)) == 0);
    /* The two forms of the interface are one. */
    ROW(KmclQueryInterface, "exports", both.VmbChannelAllocate == VmbChannelAllocate && both.VmbPacketSetPointer == VmbPacketSetPointer && both.VmbServerChannelInitSetVmbusHandle == VmbServerChannelInitSetVmbusHandle);
    both.InterfaceDereference(both.Context);
    ROW(VmbChannelCreateGpadlFromBuffer, "D-56", VMBUS_CHANNEL_GPADL_READ_ONLY == VMBUS_CHANNEL_GPADL_FLAG_READ_ONLY);
    return end();
}
