"""Byte streams -> protocol events -> observations, sans-IO. One error class comes out: `attack.errors.DecodeError`.

| file                     | from                                  | to                                            |
| ------------------------ | ------------------------------------- | --------------------------------------------- |
| `recording`              | a capture file                        | who speaks what; figures; observations        |
| `export`                 | observations                          | a file, and back                              |
| `protocol`               | what a reader of any protocol offers  |                                               |
| `zeromq`                 | all ZMTP connections                  | observations of one run                       |
| `tls`, `sealed`          | encrypted traffic                     | what sizes and timing give away               |
| `zmtp`, `frames`         | bytes of one direction                | greeting, commands, frames                    |
| `anchor`                 | bytes with unknown framing            | where a frame provably begins                 |
| `messages`               | frames                                | messages of the project's format              |
| `session`                | messages of all connections           | steps, and the places that are believed       |
| `proof`                  | the chunks of a step                  | what they prove of each gradient              |
| `vector`, `assembly`     | chunks                                | a vector and its mask                         |
| `averages`               | parts or an average                   | the server's arithmetic, forwards and back    |
| `defended`               | codes of a defense, step by step      | what they say of the gradient itself          |
"""
