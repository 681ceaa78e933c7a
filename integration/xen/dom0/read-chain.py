"""read-chain.py RAW LEAF [PARENT...]: writes the disk that a chain of VHDs holds, as libvhdi reads it."""

import sys

import pyvhdi

STEP = 1 << 20


def open_chain(paths):
    """The leaf, with every image told its parent; libvhdi needs that done from the root upwards."""
    files = []
    for path in paths:
        image = pyvhdi.file()
        image.open(path)
        files.append(image)
    for child, parent in reversed(list(zip(files, files[1:]))):
        child.set_parent(parent)
    return files[0]


def main():
    raw, leaf = sys.argv[1], open_chain(sys.argv[2:])
    size = leaf.get_media_size()
    with open(raw, "wb") as out:
        for offset in range(0, size, STEP):
            data = leaf.read_buffer_at_offset(min(STEP, size - offset), offset)
            if data.strip(b"\0"):
                out.seek(offset)
                out.write(data)
        out.truncate(size)


main()
