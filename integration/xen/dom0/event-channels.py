"""event-channels.py PID...: which domain each event channel device that the processes have open is restricted to.

The kernel does not show it. So each device is borrowed from its process, and asked to bind a port that no domain has, once for every
domain: the answer is EINVAL for the domain that the device may reach, and EACCES for the others. What else a restricted
device must refuse is tried as well. Prints the domains, in order, on one line.
"""

import ctypes
import errno
import fcntl
import os
import struct
import subprocess
import sys

# Linux include/uapi/xen/evtchn.h
BIND_INTERDOMAIN, BIND_UNBOUND_PORT, RESTRICT_DOMID = 0x84501, 0x44502, 0x24506
PIDFD_GETFD = 438
NO_PORT = 0xFFFF_FFF0


def borrowed_devices(pid):
    """Our own descriptors of the event channel devices of a process."""
    process = os.pidfd_open(pid)
    libc = ctypes.CDLL(None, use_errno=True)
    for fd in os.listdir(f"/proc/{pid}/fd"):
        if os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/xen/evtchn":
            own = libc.syscall(PIDFD_GETFD, process, int(fd), 0)
            if own < 0:
                raise OSError(ctypes.get_errno(), f"cannot borrow descriptor {fd} of {pid}")
            yield own
            os.close(own)
    os.close(process)


def answer(device, request, argument):
    """The error that the device answers with; 0: it did what it was asked for."""
    try:
        fcntl.ioctl(device, request, argument)
        return 0
    except OSError as error:
        return error.errno


def only_domain(device, domains):
    """The domain that the device is restricted to."""
    answers = {domid: answer(device, BIND_INTERDOMAIN, struct.pack("II", domid, NO_PORT)) for domid in domains}
    reached = [domid for domid, error in answers.items() if error != errno.EACCES]
    if len(reached) != 1 or answers[reached[0]] != errno.EINVAL:
        sys.exit(f"a device is not restricted to one domain: {answers}")
    for request, argument in (
        (BIND_UNBOUND_PORT, struct.pack("I", reached[0])),
        (RESTRICT_DOMID, struct.pack("H", reached[0])),
    ):
        if (error := answer(device, request, argument)) != errno.EACCES:
            sys.exit(f"a restricted device answers request {request:#x} with {error}")
    return reached[0]


def main():
    listed = subprocess.run(["xl", "list"], stdout=subprocess.PIPE, check=True, text=True).stdout
    domains = [int(line.split()[1]) for line in listed.splitlines()[1:]]
    found = [only_domain(device, domains) for pid in sys.argv[1:] for device in borrowed_devices(int(pid))]
    print(*sorted(found))


main()
