{
  # CPU addon through node-gyp, so that prebuildify works. Sources and include rules equal
  # CMakeLists.txt's: both read native/sources.json. Kernels choose their instruction set with
  # target pragmas (native/backend/cpu/kernels/isa_*.h), so no file needs flags of its own.
  'targets': [
    {
      'target_name': 'turbomind',
      'sources': [
        '<!@(node -p "const s=require(\'./native/sources.json\');[...s.core,...s.addon].map(f=>\'native/\'+f).join(\' \')")'
      ],
      'include_dirs': ['native', '<!(node -p "require(\'node-addon-api\').include_dir")'],
      'defines': ['NAPI_VERSION=8', 'NODE_ADDON_API_DISABLE_DEPRECATED', 'NODE_ADDON_API_CPP_EXCEPTIONS', 'TURBOMIND_VERSION=<!(node -p "require(\'./package.json\').version")'],
      'cflags!': ['-fno-exceptions', '-std=gnu++17', '-std=gnu++20'],
      'cflags_cc!': ['-fno-exceptions', '-fno-rtti', '-std=gnu++17', '-std=gnu++20'],
      'cflags_cc': ['-std=c++20', '-O3', '-ffp-contract=off', '-fvisibility=hidden', '-Wall', '-Wextra', '-Wno-unused-parameter'],
      'conditions': [
        ['OS=="linux"', {
          'ldflags': ['-static-libstdc++', '-static-libgcc'],
          'libraries': ['-ldl', '-lpthread']
        }],
        ['OS=="mac"', {
          'xcode_settings': { 'GCC_ENABLE_CPP_EXCEPTIONS': 'YES', 'GCC_ENABLE_CPP_RTTI': 'YES', 'CLANG_CXX_LANGUAGE_STANDARD': 'c++20', 'MACOSX_DEPLOYMENT_TARGET': '12.0' }
        }],
        ['OS=="win"', {
          'msvs_settings': { 'VCCLCompilerTool': { 'ExceptionHandling': 1, 'AdditionalOptions': ['/std:c++20'] } }
        }]
      ]
    }
  ]
}
