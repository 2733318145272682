"""What is installed, and with what. The settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent


def version() -> str:
    """`__version__` of rtunnel.py: read, not imported, because what it imports may not be installed yet."""
    found = re.search(r'^__version__ = "([^"]+)"', (HERE / "rtunnel.py").read_text("utf-8"), re.MULTILINE)
    if found is None:
        raise SystemExit('setup.py: rtunnel.py has no line `__version__ = "..."`')
    return found[1]


METRICS = ["prometheus-client>=0.20"]
TEST = [
    *METRICS,
    "hypothesis>=6.100",
    "pytest>=8",
    "pytest-timeout>=2.3",
    # A TLS stack in Python alone; the next two are its ML-DSA and ML-KEM.
    "tlslite-ng==0.9.0b2",
    "dilithium-py==1.5.1",
    "kyber-py==1.2.0",
    # The sdist and the wheel are made, and installed, by a test that has no network.
    "build>=1.2",
    "setuptools>=77",
]
FUZZ = [*TEST, "atheris>=3"]
DEV = [*TEST, "mypy>=1.15", "py-spy>=0.4", "ruff>=0.9", "twine>=6.1"]

setup(
    name="rtunnel",
    version=version(),
    description="A reverse TCP tunnel under post-quantum mutual TLS: a service behind NAT, at a public server's port",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author="the rtunnel authors",
    license="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: System Administrators",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Security :: Cryptography",
        "Topic :: System :: Networking",
    ],
    python_requires=">=3.10",
    # The first two carry OpenSSL 4 in their wheels, so that nothing has to be compiled.
    install_requires=["pyOpenSSL>=26.4", "cryptography>=49", "ConfigArgParse>=1.7.5"],
    extras_require={"metrics": METRICS, "test": TEST, "dev": DEV, "fuzz": FUZZ},
    py_modules=["rtunnel", "rtunnel_tls"],
    entry_points={"console_scripts": ["rtunnel = rtunnel:entry"]},
)
