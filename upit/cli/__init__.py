"""The command line. The only part of upit that imports lightning or the callbacks."""
