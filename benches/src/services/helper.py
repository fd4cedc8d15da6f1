# What a guest does without its agent, for the floors of `soulbox-benches guest`.
#
# Listens on a vsock port, or at a path, and takes one line on each connection:
#   echo            bytes come back, one by one
#   spawn N         so many times /bin/true; the seconds that each took, as JSON
#   take N          reads so many bytes, then says "!"
#   give N          writes so many bytes
#   fill FILE N     writes so many bytes to a new file, then says "!"
#   drain FILE      reads a file and removes it, then says "!"
#   unpack FOLDER   a tar stream into a new folder, then says "!"
#   pack FOLDER     a folder as a tar stream
import json
import os
import socket
import subprocess
import sys
import threading
import time

MIB = 1 << 20
# Of one read or write of a file, as the agent is sent them.
CHUNK = 256 << 10


def listen(where):
    if where.isdigit():
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        listener.bind((socket.VMADDR_CID_ANY, int(where)))
    else:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(where)
    listener.listen()
    return listener


def echo(peer):
    while byte := peer.recv(1):
        peer.sendall(byte)


def spawn(peer, count):
    program, environment, times = "/bin/true", dict(os.environ), []
    for _ in range(int(count)):
        start = time.perf_counter()
        os.waitpid(os.posix_spawn(program, [program], environment), 0)
        times.append(time.perf_counter() - start)
    peer.sendall(json.dumps(times).encode())


def take(peer, size):
    buffer, left = memoryview(bytearray(MIB)), int(size)
    while left:
        read = peer.recv_into(buffer, min(left, MIB))
        if not read:
            return
        left -= read
    peer.sendall(b"!")


def give(peer, size):
    buffer, left = memoryview(bytes(MIB)), int(size)
    while left:
        peer.sendall(buffer[:left])
        left -= min(left, MIB)


def fill(peer, path, size):
    buffer, left = memoryview(bytes(CHUNK)), int(size)
    with open(path, "xb", buffering=0) as file:
        while left:
            left -= file.write(buffer[:left])
    peer.sendall(b"!")


def drain(peer, path):
    buffer = bytearray(CHUNK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    os.unlink(path)
    peer.sendall(b"!")


def unpack(peer, folder):
    os.makedirs(folder)
    subprocess.run(["tar", "-xf", "-", "-C", folder], stdin=peer, check=True)
    peer.sendall(b"!")


def pack(peer, folder):
    subprocess.run(["tar", "-cf", "-", "-C", folder, "."], stdout=peer, check=True)


COMMANDS = {command.__name__: command for command in (echo, spawn, take, give, fill, drain, unpack, pack)}


def serve(peer):
    line = b""
    # What follows the line is not the line's.
    while not line.endswith(b"\n"):
        line += peer.recv(1) or b"\n"
    with peer:
        name, *arguments = line.decode().split()
        COMMANDS[name](peer, *arguments)


listener = listen(sys.argv[1])
print("ready", flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],)).start()
