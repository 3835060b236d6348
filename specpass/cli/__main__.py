from specpass.cli.entry import main

main()
