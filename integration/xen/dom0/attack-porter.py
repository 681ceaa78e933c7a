"""attack-porter.py PID PORTER OWN-IMAGE OWN-MINOR DOMID OTHER-PID OTHER-MINOR OTHER-IMAGE: what a tapdisk that was taken over asks of its porter.

The tapdisk PID serves OWN-IMAGE to the domain DOMID; OTHER-IMAGE is the disk of another tapdisk. The socket on which the tapdisk sends its
errands is borrowed, and errands are sent that are none of its business: each must be refused with EACCES. What is its business must be done.
Prints every errand with its answer; the status is 1 if one of them is wrong.

Answers go only to sockets that the tapdisk has made itself. So they are sent to its end of the visitors' socket, and taken out at the
porter's end, where nobody reads.
"""

import array
import ctypes
import errno
import json
import os
import socket
import sys

PIDFD_GETFD = 438
ROOT = "/run/blktap-control"
READ = {"write": False, "create": None, "flags": 0}
WRITE = {"write": True, "create": None, "flags": 0}
CREATE = {"write": True, "create": 0o600, "flags": 0}


def borrowed_sockets(pid):
    """Our own descriptors of the sequenced-packet sockets of a process, by its numbers."""
    process = os.pidfd_open(pid)
    libc = ctypes.CDLL(None, use_errno=True)
    found = {}
    for fd in map(int, os.listdir(f"/proc/{pid}/fd")):
        try:
            if not os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:"):
                continue
        except FileNotFoundError:
            continue
        own = libc.syscall(PIDFD_GETFD, process, fd, 0)
        if own < 0:
            continue
        taken = socket.socket(fileno=own)
        if taken.family == socket.AF_UNIX and taken.type == socket.SOCK_SEQPACKET:
            found[fd] = taken
        else:
            taken.close()
    os.close(process)
    return found


def sockets(pid, porter):
    """The tapdisk's ends of the errands' and of the visitors' socket, and the porter's end of the latter, its standard output."""
    visitors_end = borrowed_sockets(porter)[1]
    visitors_end.settimeout(1)
    errands, visitors = [], []
    for candidate in borrowed_sockets(pid).values():
        # What comes to the porter as an errand without a socket for the reply, it drops.
        candidate.send(b"?")
        try:
            visitors_end.recv(16)
            visitors.append(candidate)
        except TimeoutError:
            errands.append(candidate)
    if (len(errands), len(visitors)) != (1, 1):
        sys.exit(f"not two sockets to the porter: {errands}, {visitors}")
    return errands[0], visitors[0], visitors_end


def name(path):
    return list(os.fsencode(path))


class Porter:
    def __init__(self, pid, porter):
        self.errands, self.reply, self.answers = sockets(pid, porter)
        self.answers.settimeout(20)

    def ask(self, errand, with_file=None):
        """The answer: 0 or an errno; what is told beside it; and the descriptor that came, or None."""
        files = [self.reply.fileno()] + ([] if with_file is None else [with_file])
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))
        self.errands.sendmsg([json.dumps(errand).encode()], [rights])
        text, control, _, _ = self.answers.recvmsg(1 << 18, socket.CMSG_SPACE(8))
        descriptors = array.array("i")
        for _, _, data in control:
            descriptors.frombytes(data)
        answer = json.loads(text)
        failure = answer.get("Err")
        return (failure["errno"] if failure else 0), answer, (descriptors[0] if descriptors else None)


def attacks(own_image, own_minor, domid, other_pid, other_minor, other_image, record):
    """Errands that are none of the tapdisk's business, some about an open file."""
    root = name(ROOT)
    other_record = json.loads(json.dumps(record).replace(json.dumps(own_image), json.dumps(other_image)))
    if other_record == record:
        sys.exit(f"the record does not name {own_image}: {record}")
    for path in ("/etc/shadow", "/dev/xen/privcmd", "/proc/1/mem", other_image):
        yield {"open": {"path": name(path), "how": READ}}, None
        yield {"open": {"path": name(path), "how": WRITE}}, None
    yield {"open": {"path": name("/etc/evil"), "how": CREATE}}, None
    # Any user may have such descriptors, with the rights to nothing.
    yield {"again": {"how": READ}}, os.open("/etc/shadow", os.O_PATH)
    yield {"again": {"how": WRITE}}, os.open("/etc/passwd", os.O_RDONLY)
    yield {"again": {"how": WRITE}}, os.open(other_image, os.O_PATH)
    yield {"remove": {"path": name(other_image)}}, None
    yield {"remove": {"path": name("/etc/hostname")}}, None
    yield {"link": {"from": name(other_image), "to": name(f"{own_image}.link")}}, None
    yield {"link": {"from": name(own_image), "to": name("/etc/evil")}}, None
    yield {"make-folder": {"path": name("/etc/evil")}}, None
    yield {"remove-folder": {"path": name("/var/empty")}}, None
    yield {"listen": {"path": name("/run/evil")}}, None
    yield {"listen": {"path": name(f"{ROOT}/ctl{other_pid}")}}, None
    yield {"alias": {"path": name(f"{ROOT}/nbd{other_pid}.{other_minor}"), "alias": name(f"{ROOT}/nbd1.1")}}, None
    for path in ("/run/xenstored/socket", f"{ROOT}/nbd{other_pid}.{other_minor}", f"{ROOT}/ctl{other_pid}"):
        yield {"connect": {"path": name(path)}}, None
    for minor in (other_minor, own_minor + other_minor + 1):
        yield {"claim": {"root": root, "minor": minor}}, None
    yield {"claim": {"root": name("/etc"), "minor": own_minor}}, None
    for what in ("read", "begin", "forget", "end", {"write": record}):
        yield {"keep": {"root": root, "minor": other_minor, "what": what}}, None
    yield {"keep": {"root": root, "minor": own_minor, "what": {"write": other_record}}}, None
    yield {"clean-up": {"root": root, "dead": other_pid, "minor": other_minor, "except": name("")}}, None
    for dom in (0, domid + 1):
        yield {"events": {"dom": dom}}, None


def shown(errand):
    """An errand with names that people can read."""
    def text(value):
        if isinstance(value, list) and value and all(isinstance(byte, int) for byte in value):
            return os.fsdecode(bytes(value))
        return value
    if isinstance(errand, str):
        return errand
    (kind, fields), = errand.items()
    return f"{kind} {json.dumps({key: text(value) for key, value in fields.items()})}"[:160]


def main():
    pid, porter, own_image, own_minor, domid, other_pid, other_minor, other_image = sys.argv[1:]
    own_minor, domid, other_pid, other_minor = int(own_minor), int(domid), int(other_pid), int(other_minor)
    desk = Porter(int(pid), int(porter))
    with open(f"{ROOT}/inflight{own_minor}/record", encoding="utf-8") as file:
        record = json.load(file)
    wrong = 0
    for errand, with_file in attacks(own_image, own_minor, domid, other_pid, other_minor, other_image, record):
        answer, told, descriptor = desk.ask(errand, with_file)
        good = answer == errno.EACCES and descriptor is None
        wrong += not good
        print("refused:" if good else f"WRONG, {told}:", shown(errand), flush=True)
    for how in (READ, WRITE):
        errand = {"open": {"path": name(own_image), "how": how}}
        answer, told, descriptor = desk.ask(errand)
        good = answer == 0 and descriptor is not None and os.path.sameopenfile(descriptor, os.open(own_image, os.O_RDONLY))
        wrong += not good
        print("done:" if good else f"WRONG, {told}:", shown(errand), flush=True)
    print(f"{wrong} wrong answers")
    sys.exit(wrong != 0)


main()
